// Which devices the CUDA runtime finds.
#include "cuda/coder_cuda.h"
#include "cuda/cuda_threads.cuh"

namespace percov2 {

std::vector<std::string> cuda_devices() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  // Neither a machine without a card nor one without a driver is a fault.
  if (error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver) {
    cudaGetLastError();  // not a fault of the next launch either
    return {};
  }
  throw_if_failed(error, "the CUDA runtime cannot count devices");
  std::vector<std::string> names;
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties{};
    throw_if_failed(cudaGetDeviceProperties(&properties, i), "a CUDA device cannot be asked");
    names.emplace_back(properties.name);
  }
  return names;
}

}  // namespace percov2
