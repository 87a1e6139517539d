// CUDA's threads on a CPU, for kernels written against csrc/cuda/cuda_threads.cuh.
//
// The threads of a block are fibers; a fiber runs until it meets others (a barrier, a shuffle, a
// vote, a reduction), and which one goes on is drawn by the order in force. Blocks run one after
// another, in that order too. A shuffle, a vote or a reduction orders no memory accesses, as CUDA
// says; only __syncwarp and __syncthreads do. Under ThreadSanitizer a fiber is a thread of its own,
// so accesses that no barrier orders are reported, whatever the order.
//
// What CUDA leaves undefined ends the program with a message: lanes that meet at different calls, a
// partial mask, threads that have left before a barrier, threads that wait for ever.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#include "cuda/coder_cuda.h"

#define __global__
#define __device__
#define __constant__
#define __launch_bounds__(threads)
// Fresh memory for every block, between guard zones under AddressSanitizer.
#define PERCOV2_SHARED(type, name, count)                                                      \
  static_assert(std::is_trivially_copyable<type>::value, "shared memory has no constructors"); \
  type* const name = static_cast<type*>(                                                       \
      percov2_emulation::shared_memory(__FILE__, __LINE__, sizeof(type) * (count)))

#define threadIdx (percov2_emulation::thread_index())
#define blockIdx (percov2_emulation::block_index())

namespace percov2_emulation {

struct Index {
  unsigned x;
};

enum class Order { kForward, kReverse, kRandom };

// How the fibers of later launches are drawn. Barrier `omitted` of those met so far (in the order
// of barrier_count()) is passed without waiting; -1: none.
void configure(Order order, std::uint64_t seed, int omitted);
// Calls of __syncwarp and __syncthreads at different places that were met since the program began.
int barrier_count();
// "file:line" of one of them.
const char* barrier_place(int barrier);
// Meetings of all kinds, and launches, since the program began.
std::int64_t meeting_count();
std::int64_t launch_count();

void run(std::int64_t blocks, int threads, const std::function<void()>& body);

Index thread_index();
Index block_index();
void* shared_memory(const char* file, int line, std::size_t bytes);
void sync_block(const char* file, int line);
void sync_warp(const char* file, int line);
// Waits for the other lanes and returns the values of all 32.
const std::uint64_t* exchange(const char* file, int line, unsigned mask, std::uint64_t value);
int lane();

template <class T>
std::uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "what registers hold");
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}
template <class T>
T from_bits(std::uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace percov2_emulation

#define PERCOV2_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(PERCOV2_CALLER) { percov2_emulation::sync_block(file, line); }
inline void __syncwarp(PERCOV2_CALLER) { percov2_emulation::sync_warp(file, line); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source, PERCOV2_CALLER) {
  namespace e = percov2_emulation;
  return e::from_bits<T>(e::exchange(file, line, mask, e::to_bits(value))[source & 31]);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, PERCOV2_CALLER) {
  namespace e = percov2_emulation;
  const std::uint64_t* values = e::exchange(file, line, mask, e::to_bits(value));
  const int source = e::lane() - static_cast<int>(distance);
  return e::from_bits<T>(values[source < 0 ? e::lane() : source]);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, PERCOV2_CALLER) {
  namespace e = percov2_emulation;
  const std::uint64_t* values = e::exchange(file, line, mask, e::to_bits(value));
  const int source = e::lane() + static_cast<int>(distance);
  return e::from_bits<T>(values[source > 31 ? e::lane() : source]);
}
inline unsigned __ballot_sync(unsigned mask, bool vote, PERCOV2_CALLER) {
  const std::uint64_t* votes = percov2_emulation::exchange(file, line, mask, vote);
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) result |= static_cast<unsigned>(votes[i]) << i;
  return result;
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value, PERCOV2_CALLER) {
  const std::uint64_t* values = percov2_emulation::exchange(file, line, mask, value);
  unsigned sum = 0;
  for (int i = 0; i < 32; ++i) sum += static_cast<unsigned>(values[i]);
  return sum;
}
inline int __reduce_max_sync(unsigned mask, int value, PERCOV2_CALLER) {
  namespace e = percov2_emulation;
  const std::uint64_t* values = e::exchange(file, line, mask, e::to_bits(value));
  int most = value;
  for (int i = 0; i < 32; ++i) {
    const int other = e::from_bits<int>(values[i]);
    most = other > most ? other : most;
  }
  return most;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

namespace percov2 {

template <class... Parameters, class... Arguments>
void launch(const CudaQueue&, std::int64_t blocks, int threads, void (*kernel)(Parameters...),
            const Arguments&... arguments) {
  percov2_emulation::run(blocks, threads, [=] { kernel(arguments...); });
}

}  // namespace percov2
