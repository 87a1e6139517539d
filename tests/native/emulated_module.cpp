// A Python module with the CUDA part of percov2._native, whose kernels run in the emulation and
// whose tensors lie on the CPU.
#include "cuda_emulation.h"
#include "python/bindings.h"

PYBIND11_MODULE(emulated_cuda, module) {
  percov2::bind_cuda(module);
  module.def("launches", &percov2_emulation::launch_count);
}
