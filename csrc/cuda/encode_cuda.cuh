// Kernels of the batched encoder. docs/explanation/gpu-kernels.md derives their form.
//
// A warp encodes one stream, 32 symbols at a time. Each lane loads and checks one symbol and
// computes its reciprocal. All lanes then walk the same chain of states, and each keeps the state
// before its own symbol. A scan finds the place of each lane's bytes, which are stored together. So
// only work that depends on the state waits for it.
#pragma once

#include <cstdint>

#include "coder/rans.h"
#include "coder/reciprocal.h"
#include "cuda/coder_cuda.h"
#include "cuda/cuda_threads.cuh"

namespace percov2 {

constexpr int kEncodeWarps = 4;  // per block: one for each scheduler of a multiprocessor
constexpr int kPackThreads = 256;

// Room for one stream in the scratch memory, written from its end downwards.
PERCOV2_HOST_DEVICE std::int64_t area_bytes(std::int64_t symbols) {
  return kMaxBytesPerSymbol * symbols + 4;
}

// Device pointers of one encoding.
struct EncodeMemory {
  EncodeTask task;
  PackedHead head;
  std::uint8_t* streams;  // after the head
  std::int32_t* lengths;  // [streams], in the scratch memory
  std::uint8_t* areas;    // after them
};

// One symbol as the chain reads it.
struct alignas(16) Step {
  std::uint32_t start;
  std::uint32_t freq;
  Reciprocal by;
};

// The interval that changes no state, for lanes without a symbol.
__device__ inline Step neutral_step(int prob_bits) {
  const std::uint32_t all = 1u << prob_bits;
  return {0, all, {1u << 31, static_cast<std::uint32_t>(prob_bits)}};
}

__global__ void __launch_bounds__(kEncodeWarps* kWarp) encode_kernel(const EncodeMemory memory) {
  PERCOV2_SHARED(Step, shared_steps, kEncodeWarps * kWarp);
  const EncodeTask& task = memory.task;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const std::int64_t stream = static_cast<std::int64_t>(blockIdx.x) * kEncodeWarps + warp;
  if (stream >= task.streams) return;  // all lanes return; the block has no later barrier
  Step* steps = shared_steps + warp * kWarp;
  const int prob_bits = task.prob_bits;

  const std::int32_t check = task.checks[stream];
  std::int64_t left = task.counts == nullptr ? task.symbols : task.counts[stream];
  std::int32_t status = kOk;
  if (check < 0 || check > 0xFFFF) status = kBadCheck;
  if (left < 0 || left > task.symbols) status = kBadCount;
  if (status != kOk) left = 0;

  std::uint8_t* const end = memory.areas + (stream + 1) * area_bytes(task.symbols);
  std::uint8_t* top = end;
  const std::int32_t* starts = task.starts + stream * task.symbols;
  const std::int32_t* freqs = task.freqs + stream * task.symbols;
  std::uint32_t x = static_cast<std::uint32_t>(check);
  std::int32_t quiet = 0;
  bool valid = true;

  // Lane 0 has the last symbol. The next symbols are loaded while the chain runs.
  std::int64_t mine = left - 1 - lane;
  std::int32_t start = mine >= 0 ? starts[mine] : 0;
  std::int32_t freq = mine >= 0 ? freqs[mine] : 1 << prob_bits;
  for (; left > 0; left -= kWarp) {
    const bool present = mine >= 0;
    const bool good = valid_interval(start, freq, prob_bits);
    valid = valid && good;
    Step step = neutral_step(prob_bits);
    if (present && good) {
      step.start = static_cast<std::uint32_t>(start);
      step.freq = static_cast<std::uint32_t>(freq);
      step.by = reciprocal(step.freq);
    }
    __syncwarp();  // all lanes have read the previous steps
    steps[lane] = step;
    __syncwarp();
    mine -= kWarp;
    start = mine >= 0 ? starts[mine] : 0;
    freq = mine >= 0 ? freqs[mine] : 1 << prob_bits;

    std::uint32_t before = x;
#pragma unroll 8
    for (int i = 0; i < kWarp; ++i) {
      const Step now = steps[i];
      before = i == lane ? x : before;
      x = encode_symbol(without_surplus(x, now.freq, prob_bits), now.start, now.freq, now.by,
                        prob_bits);
    }

    const std::uint32_t bytes = surplus_bytes(before, step.freq, prob_bits);
    const std::uint32_t after =
        encode_symbol(before >> (8 * bytes), step.start, step.freq, step.by, prob_bits);
    quiet += __popc(__ballot_sync(kAllLanes, present && after < kLowerBound));
    std::uint32_t emitted = bytes;  // by this lane and those before it
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const std::uint32_t others = __shfl_up_sync(kAllLanes, emitted, distance);
      if (lane >= distance) emitted += others;
    }
    std::uint8_t* const place = top - (emitted - bytes);
    if (bytes > 0) place[-1] = static_cast<std::uint8_t>(before);
    if (bytes > 1) place[-2] = static_cast<std::uint8_t>(before >> 8);
    if (bytes > 2) place[-3] = static_cast<std::uint8_t>(before >> 16);
    top -= __shfl_sync(kAllLanes, emitted, kWarp - 1);
  }
  if (__ballot_sync(kAllLanes, !valid) != 0 && status == kOk) status = kBadInterval;

  const int head = head_bytes(x);
  if (lane < head) top[-1 - lane] = static_cast<std::uint8_t>(x >> (8 * lane));
  if (lane == 0) {
    memory.lengths[stream] = status == kOk ? static_cast<std::int32_t>(end - top) + head : 0;
    memory.head.status[stream] = status;
    memory.head.quiet[stream] = status == kOk ? quiet : 0;
  }
}

// A block moves one stream to its place, the sum of the lengths before it.
__global__ void __launch_bounds__(kPackThreads) pack_kernel(const EncodeMemory memory) {
  PERCOV2_SHARED(std::int64_t, sums, kPackThreads / kWarp);
  const EncodeTask& task = memory.task;
  const std::int64_t stream = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  if (task.streams == 0) {  // one block writes the empty head
    if (thread == 0) memory.head.offsets[0] = 0;
    return;
  }

  std::int64_t begin = 0;
  for (std::int64_t b = thread; b < stream; b += kPackThreads) begin += memory.lengths[b];
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    begin += __shfl_down_sync(kAllLanes, begin, distance);
  }
  if (thread % kWarp == 0) sums[thread / kWarp] = begin;
  __syncthreads();
  begin = 0;
  for (int warp = 0; warp < kPackThreads / kWarp; ++warp) begin += sums[warp];

  const std::int64_t length = memory.lengths[stream];
  const bool fits = begin + length <= task.capacity;
  if (thread == 0) {
    memory.head.offsets[stream] = begin;
    if (stream + 1 == task.streams) memory.head.offsets[stream + 1] = begin + length;
    if (!fits && length > 0) memory.head.status[stream] = kBufferFull;
  }
  if (!fits) return;
  const std::uint8_t* source = memory.areas + (stream + 1) * area_bytes(task.symbols) - length;
  std::uint8_t* const place = memory.streams + begin;
  const auto count = static_cast<std::int32_t>(length);
#pragma unroll 4
  for (std::int32_t i = thread; i < count; i += kPackThreads) place[i] = source[i];
}

}  // namespace percov2
