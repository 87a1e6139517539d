// The kernel of the batched decoder: from logits to symbols. docs/explanation/gpu-kernels.md
// derives its form.
//
// A warp decodes one stream. A row of logits has blocks of 256, eight logits per lane, as on the
// CPU. One pass finds the largest logit, a second one the sums of the blocks' weights. The search
// goes from block to lane to symbol. All comparisons are exact and need no division. Neither pass
// waits for the state.
#pragma once

#include <cstdint>

#include "coder/rans.h"
#include "coder/weight_table.h"
#include "cuda/coder_cuda.h"
#include "cuda/cuda_threads.cuh"

namespace percov2 {

constexpr int kDecodeWarps = 4;  // per block
constexpr int kOctet = 8;        // logits that a lane takes together: 16 bytes
constexpr int kCudaBlock = kWarp * kOctet;

struct WeightTable {
  std::uint32_t weights[256];
};
constexpr WeightTable copy_of_weight_table() {
  WeightTable table{};
  for (int i = 0; i < 256; ++i) table.weights[i] = kWeightTable[i];
  return table;
}
static __constant__ const WeightTable kCudaWeights = copy_of_weight_table();

struct alignas(16) Octet {
  std::int16_t logits[kOctet];
};

// Logits at .. at + 7 of a row, -32768 beyond its end. A whole row begins at a multiple of 16
// bytes, and its length is a multiple of 8.
template <bool Whole>
__device__ inline Octet load_octet(const std::int16_t* row, int at, int codebook) {
  Octet octet;
  if (Whole && at < codebook) return *reinterpret_cast<const Octet*>(row + at);
#pragma unroll
  for (int k = 0; k < kOctet; ++k) {
    octet.logits[k] = !Whole && at + k < codebook ? row[at + k] : INT16_MIN;
  }
  return octet;
}

// Weights of the logits at .. at + 7 of a row whose largest is `top`, 0 beyond its end.
template <bool Whole>
__device__ inline void weigh_octet(const std::int16_t* row, int at, int codebook, int top,
                                   const std::uint32_t* table, std::uint32_t* weights) {
  const Octet octet = load_octet<Whole>(row, at, codebook);
#pragma unroll
  for (int k = 0; k < kOctet; ++k) {
    const int difference = top - octet.logits[k];
    const int octaves = difference >> 8;
    const std::uint32_t weight = table[difference & 255] >> (octaves < 31 ? octaves : 31);
    weights[k] = (Whole ? at : at + k) < codebook ? weight : 0;
  }
}

// floor(prefix * spread / total) + index. The quotient is below 2^20, and four roundings to float32
// change it by less than 2^20 * 2^-22 < 1. So its integer part is off by one at most.
__device__ inline std::uint32_t boundary(std::uint64_t prefix, std::uint32_t spread,
                                         std::uint64_t total, float inverse, std::uint32_t index) {
  const std::uint64_t numerator = prefix * spread;
  std::uint32_t quotient = static_cast<std::uint32_t>(static_cast<float>(numerator) * inverse);
  const auto rest = static_cast<std::int64_t>(numerator - quotient * total);
  quotient += static_cast<std::uint32_t>(rest >= static_cast<std::int64_t>(total));
  quotient -= static_cast<std::uint32_t>(rest < 0);
  return quotient + index;
}

// The fault of a stream before any byte of it is read.
__device__ inline std::int32_t stream_status(const DecodeTask& task, std::int64_t begin,
                                             std::int64_t end, std::int32_t state,
                                             std::int64_t position) {
  if (begin < 0 || end < begin || end > task.size) return kBadOffsets;
  if (state < 0) return kBadState;
  if (position < 0 || position > end - begin) return kBadPosition;
  return kOk;
}

// The rows of logits of one stream.
struct Rows {
  std::int64_t first;
  std::int64_t count;  // negative if they are not among those of all streams
};
__device__ inline Rows rows_of(const DecodeTask& task, std::int64_t stream) {
  if (task.rows == nullptr) return {stream * task.symbols, task.symbols};
  const std::int64_t first = task.rows[stream], next = task.rows[stream + 1];
  return {first, first >= 0 && next >= first && next <= task.symbols ? next - first : -1};
}

template <bool Whole>
__global__ void __launch_bounds__(kDecodeWarps* kWarp) decode_kernel(const DecodeTask task) {
  PERCOV2_SHARED(std::uint32_t, table, 256);
  for (unsigned i = threadIdx.x; i < 256; i += kDecodeWarps * kWarp) {
    table[i] = kCudaWeights.weights[i];
  }
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const std::int64_t stream =
      static_cast<std::int64_t>(blockIdx.x) * kDecodeWarps + threadIdx.x / kWarp;
  if (stream >= task.streams) return;  // all lanes return; the block has no later barrier

  const std::int64_t begin = task.offsets[stream];
  const std::int64_t end = task.offsets[stream + 1];
  const std::int32_t state = task.states[stream];
  std::int64_t position = task.positions[stream];
  const Rows rows = rows_of(task, stream);
  const std::int32_t status =
      rows.count < 0 ? kBadRows : stream_status(task, begin, end, state, position);
  if (lane == 0) task.status[stream] = status;
  std::int32_t* decoded = task.decoded + rows.first;
  if (status != kOk) {
    for (std::int64_t i = lane; i < rows.count; i += kWarp) decoded[i] = 0;
    return;
  }

  const int codebook = static_cast<int>(task.codebook);
  const int prob_bits = task.prob_bits;
  const std::uint32_t spread = (1u << prob_bits) - static_cast<std::uint32_t>(codebook);
  const int blocks = (codebook + kCudaBlock - 1) / kCudaBlock;
  position += begin;
  std::uint32_t x = refill(static_cast<std::uint32_t>(state), task.bytes, position, end);
  for (std::int64_t i = 0; i < rows.count; ++i) {
    const std::int16_t* row = task.logits + (rows.first + i) * codebook;
    // Bytes that this symbol may shift in, loaded early.
    const bool whole = x >= kLowerBound && end - position >= 4;
    const std::uint32_t word = whole ? load_word(task.bytes + position) : 0;

    int top = INT16_MIN;
    for (int block = 0; block < blocks; ++block) {
      const Octet octet = load_octet<Whole>(row, block * kCudaBlock + lane * kOctet, codebook);
#pragma unroll
      for (int k = 0; k < kOctet; ++k) top = octet.logits[k] > top ? octet.logits[k] : top;
    }
    top = __reduce_max_sync(kAllLanes, top);

    std::uint32_t weights[kOctet];
    std::uint64_t total = 0;
    std::uint64_t prefix = 0;  // of the block with this lane's number
    int block = 0;
    do {
      weigh_octet<Whole>(row, block * kCudaBlock + lane * kOctet, codebook, top, table, weights);
      std::uint32_t sum = 0;  // below 256 * 2^22
#pragma unroll
      for (int k = 0; k < kOctet; ++k) sum += weights[k];
      sum = __reduce_add_sync(kAllLanes, sum);
      total += sum;
      prefix += block < lane ? sum : 0;
    } while (++block < blocks);

    // start_j <= target  <=>  P_j * spread + j * total < (target + 1) * total. This is true for
    // j = 0 and false from some j <= V on, because P_V = total and spread + V = 2^prob_bits >
    // target. So blocks and lanes beyond the end are never reached. Both sides stay below 2^56.
    std::uint64_t bound = (std::uint64_t{slot(x, prob_bits)} + 1) * total;
    const bool block_reached =
        prefix * spread + static_cast<std::uint64_t>(lane * kCudaBlock) * total < bound;
    block = __popc(__ballot_sync(kAllLanes, block_reached)) - 1;
    const std::uint64_t before = __shfl_sync(kAllLanes, prefix, block);
    bound -= before * spread + static_cast<std::uint64_t>(block * kCudaBlock) * total;

    if (blocks > 1) {  // a single block is still in registers
      weigh_octet<Whole>(row, block * kCudaBlock + lane * kOctet, codebook, top, table, weights);
    }
    std::uint32_t sum = 0;
#pragma unroll
    for (int k = 0; k < kOctet; ++k) sum += weights[k];
    std::uint32_t inside = sum;  // weights of this block before this lane's
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const std::uint32_t others = __shfl_up_sync(kAllLanes, inside, distance);
      if (lane >= distance) inside += others;
    }
    inside -= sum;
    // Eight comparisons per lane count the symbols reached, and so find the last one.
    std::uint64_t left =
        std::uint64_t{inside} * spread + static_cast<std::uint64_t>(lane * kOctet) * total;
    std::uint32_t running = inside;
    std::uint32_t own = 0;  // weight and prefix of the last symbol reached
    int reached = 0;
#pragma unroll
    for (int k = 0; k < kOctet; ++k) {
      if (left < bound) {
        reached = k + 1;
        inside = running;
        own = weights[k];
      }
      running += weights[k];
      left += std::uint64_t{weights[k]} * spread + total;
    }
    const int holder = __popc(__ballot_sync(kAllLanes, reached > 0)) - 1;
    const int symbol =
        block * kCudaBlock + holder * kOctet + __shfl_sync(kAllLanes, reached, holder) - 1;
    prefix = before + __shfl_sync(kAllLanes, inside, holder);
    own = __shfl_sync(kAllLanes, own, holder);

    const float inverse = 1.0f / static_cast<float>(total);
    const auto index = static_cast<std::uint32_t>(symbol);
    const std::uint32_t start = boundary(prefix, spread, total, inverse, index);
    const std::uint32_t next = boundary(prefix + own, spread, total, inverse, index + 1);
    x = advance(x, start, next - start, prob_bits);
    if (whole) {  // such a state keeps at least 3 bits, and 4 readable bytes follow
      const std::uint32_t bytes = lacking_bytes(x);
      x = shift_in(x, word, bytes);
      position += bytes;
    } else {
      x = refill(x, task.bytes, position, end);
    }
    if (lane == 0) decoded[i] = symbol;
  }
  __syncwarp();  // all lanes have read state and position
  if (lane == 0) {
    task.states[stream] = static_cast<std::int32_t>(x);
    task.positions[stream] = position - begin;
  }
}

}  // namespace percov2
