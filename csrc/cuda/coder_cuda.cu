// Launches of the batch coder on CUDA devices. Tests also compile this file for the emulation.
#include <stdexcept>
#include <string>

#include "cuda/coder_cuda.h"
#include "cuda/decode_cuda.cuh"
#include "cuda/encode_cuda.cuh"

namespace percov2 {
namespace {

constexpr std::int64_t kMostStreams = std::int64_t{1} << 24;  // pack_kernel adds lengths
constexpr std::int64_t kMostSymbols = std::int64_t{1} << 28;  // a length has 31 bits
constexpr std::int64_t kAlignment = 16;

std::int64_t aligned(std::int64_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

void check_range(const char* name, std::int64_t value, std::int64_t least, std::int64_t most) {
  if (value < least || value > most) {
    throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) +
                                "; it must be " + std::to_string(least) + " to " +
                                std::to_string(most));
  }
}

void check_sizes(std::int64_t streams, std::int64_t symbols) {
  check_range("the number of streams", streams, 0, kMostStreams);
  check_range("the number of symbols per stream", symbols, 0, kMostSymbols);
}

void check_aligned(const char* name, const void* pointer) {
  if (reinterpret_cast<std::uintptr_t>(pointer) % kAlignment != 0) {
    throw std::invalid_argument(std::string(name) + " does not begin at a multiple of 16 bytes");
  }
}

std::int64_t blocks_of(std::int64_t streams, int warps) { return (streams + warps - 1) / warps; }

}  // namespace

std::int64_t encode_scratch_bytes(std::int64_t streams, std::int64_t symbols) {
  check_sizes(streams, symbols);
  return aligned(4 * streams) + streams * area_bytes(symbols);
}

std::int64_t packed_head_bytes(std::int64_t streams) {
  check_sizes(streams, 0);
  return aligned(8 * (streams + 1) + 4 * streams + 4 * streams);
}

std::int64_t packed_most_bytes(std::int64_t streams, std::int64_t symbols) {
  check_sizes(streams, symbols);
  return streams * area_bytes(symbols);
}

PackedHead packed_head(std::uint8_t* packed, std::int64_t streams) {
  std::uint8_t* const status = packed + 8 * (streams + 1);
  return {reinterpret_cast<std::int64_t*>(packed), reinterpret_cast<std::int32_t*>(status),
          reinterpret_cast<std::int32_t*>(status + 4 * streams)};
}

void encode_streams(const EncodeTask& task, const CudaQueue& queue) {
  check_sizes(task.streams, task.symbols);
  check_range("prob_bits", task.prob_bits, kMinProbBits, kMaxProbBits);
  check_range("capacity", task.capacity, 0, INT64_MAX);
  check_aligned("scratch", task.scratch);
  check_aligned("packed", task.packed);
  const EncodeMemory memory = {
      task, packed_head(task.packed, task.streams), task.packed + packed_head_bytes(task.streams),
      reinterpret_cast<std::int32_t*>(task.scratch), task.scratch + aligned(4 * task.streams)};
  if (task.streams > 0) {
    launch(queue, blocks_of(task.streams, kEncodeWarps), kEncodeWarps * kWarp, encode_kernel,
           memory);
  }
  launch(queue, task.streams > 0 ? task.streams : 1, kPackThreads, pack_kernel, memory);
}

void decode_stage(const DecodeTask& task, const CudaQueue& queue) {
  check_sizes(task.streams, task.symbols);
  check_range("prob_bits", task.prob_bits, kMinProbBits, kMaxProbBits);
  check_range("the codebook's size", task.codebook, 2, 8192);
  if ((std::int64_t{1} << task.prob_bits) < 2 * task.codebook) {
    throw std::invalid_argument("prob_bits is " + std::to_string(task.prob_bits) +
                                ", too few for a codebook of " + std::to_string(task.codebook) +
                                " entries: 2^prob_bits must be at least twice its size");
  }
  check_range("size", task.size, 0, INT64_MAX);
  if (task.streams == 0) return;
  const bool whole = task.codebook % kOctet == 0 &&
                     reinterpret_cast<std::uintptr_t>(task.logits) % kAlignment == 0;
  launch(queue, blocks_of(task.streams, kDecodeWarps), kDecodeWarps * kWarp,
         whole ? decode_kernel<true> : decode_kernel<false>, task);
}

}  // namespace percov2
