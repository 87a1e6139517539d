// The batch coder for CUDA devices, for the emulation.
#include "../../csrc/cuda/coder_cuda.cu"

namespace percov2 {

std::vector<std::string> cuda_devices() { return {"emulation"}; }

}  // namespace percov2
