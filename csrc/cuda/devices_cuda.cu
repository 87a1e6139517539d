// The devices of the CUDA runtime.
#include "cuda/coder_cuda.h"
#include "cuda/cuda_threads.cuh"

namespace percov2 {

std::vector<std::string> cuda_devices() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  // A machine without a card or a driver is no fault.
  if (error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver) {
    cudaGetLastError();  // clears the error, which the next launch would report
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
