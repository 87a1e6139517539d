// The parts of CUDA's language in use, for nvcc and for the emulation in tests/native. There a
// thread of a block is a fiber, and a launch is a loop over blocks.
#pragma once

#include <cstdint>

#include "cuda/coder_cuda.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

// An array that the threads of a block share.
#define PERCOV2_SHARED(type, name, count) __shared__ type name[count]

namespace percov2 {

inline void throw_if_failed(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    cudaGetLastError();  // clears the error, which the next launch would report
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

// Queues a kernel on the device and stream of `queue`; the caller's device stays the current one.
template <class... Parameters, class... Arguments>
void launch(const CudaQueue& queue, std::int64_t blocks, int threads, void (*kernel)(Parameters...),
            const Arguments&... arguments) {
  int before = 0;
  throw_if_failed(cudaGetDevice(&before), "no CUDA device can be used");
  const bool other = before != queue.device;  // setting a device makes a context on it
  if (other) throw_if_failed(cudaSetDevice(queue.device), "the CUDA device cannot be used");
  kernel<<<static_cast<unsigned>(blocks), threads, 0, static_cast<cudaStream_t>(queue.stream)>>>(
      arguments...);
  const cudaError_t launched = cudaGetLastError();
  if (other) throw_if_failed(cudaSetDevice(before), "the CUDA device cannot be used");
  throw_if_failed(launched, "a CUDA kernel could not be launched");
}

}  // namespace percov2
#else
#include "cuda_emulation.h"
#endif

namespace percov2 {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

}  // namespace percov2
