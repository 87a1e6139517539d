// Kernels of the quantizer: int16 logits to sums of weights, and the search among them.
//
// The interval of a known symbol takes one pass over the row and no table. For the search, a row
// has blocks of 256 logits, and a block has 16 groups of 16. One pass gives all weights and the
// sums of groups and blocks. The search needs no division and reads one group. All numbers are
// exact integers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "coder/weight_table.h"

namespace percov2 {

constexpr std::int64_t kRowGroup = 16;
constexpr std::int64_t kRowBlock = 256;
constexpr std::int64_t kMaxBlocks = 8192 / kRowBlock;

// The share of a symbol in its row.
struct Share {
  std::uint64_t prefix;  // sum of the weights before it
  std::uint64_t total;   // of all weights
  std::uint32_t weight;  // its own
};

// The place of a symbol in its block. Functions write it through a pointer: returned in registers,
// it would be stored in parts and loaded whole, which stalls a processor.
struct Place {
  std::int32_t index;
  std::uint32_t prefix;  // sum of the weights before it in the block, < 2^30
  std::uint32_t weight;
};

struct IntervalKernels {
  // Largest of count >= 1 logits.
  std::int32_t (*row_max)(const std::int16_t* logits, std::int64_t count);
  // The share of one of count <= 8192 logits, none of which exceeds `top`.
  Share (*share)(const std::int16_t* logits, std::int64_t count, std::int32_t top,
                 std::int32_t symbol);
  // All weights, with zeros up to a whole number of blocks, and the sums of groups and blocks:
  // weights[256 * blocks], groups[16 * blocks], blocks[ceil(count / 256)].
  void (*weigh)(const std::int16_t* logits, std::int64_t count, std::int32_t top,
                std::uint32_t* weights, std::uint32_t* groups, std::uint32_t* blocks);
  // With p_i = sum of the first i weights of a block, i < count <= 256: the last i for which
  // p_i * spread + i * total < bound. i = 0 must meet it; spread < 2^20, total < 2^35,
  // bound < 2^56.
  void (*search)(const std::uint32_t* weights, const std::uint32_t* groups, std::int64_t count,
                 std::uint64_t spread, std::uint64_t total, std::uint64_t bound, Place* place);
  // Natural-log logits to base-2 logits in 1/256 of an octave below the largest: float32
  // rint((x - max) * (256 / ln 2)), at least -32768. False if one is NaN or none is finite or one
  // is +inf; -inf is allowed. Writes count int16 numbers, the largest of which is 0.
  bool (*round_floats)(const float* logits, std::int64_t count, std::int16_t* out);
  // The same for bfloat16, the upper halves of float32.
  bool (*round_bfloats)(const std::uint16_t* logits, std::int64_t count, std::int16_t* out);
  // round_floats with share or weigh in one, for units where that is faster; otherwise null. False
  // as for round_floats.
  bool (*share_floats)(const float* logits, std::int64_t count, std::int32_t symbol,
                       Share* share) = nullptr;
  bool (*share_bfloats)(const std::uint16_t* logits, std::int64_t count, std::int32_t symbol,
                        Share* share) = nullptr;
  bool (*weigh_floats)(const float* logits, std::int64_t count, std::uint32_t* weights,
                       std::uint32_t* groups, std::uint32_t* blocks) = nullptr;
  bool (*weigh_bfloats)(const std::uint16_t* logits, std::int64_t count, std::uint32_t* weights,
                        std::uint32_t* groups, std::uint32_t* blocks) = nullptr;
};

extern const IntervalKernels kScalarIntervals;
extern const IntervalKernels kAvx2Intervals;
extern const IntervalKernels kAvx512Intervals;
extern const IntervalKernels kNeonIntervals;

// 256 / ln 2 in float32.
constexpr float kStepsPerNat = 369.329925537109375f;

// Weight of a logit `difference` (0 .. 65535) below the largest. Entries are below 2^22, so a shift
// by 22 or more gives 0; 31 keeps the shift defined.
static inline std::uint32_t logit_weight(std::int32_t difference) {
  const std::int32_t octaves = difference >> 8;
  return kWeightTable[difference & 255] >> (octaves < 31 ? octaves : 31);
}

// bfloat16 as float32.
static inline float widened(std::uint16_t upper) {
  const std::uint32_t bits = static_cast<std::uint32_t>(upper) << 16;
  float wide;
  __builtin_memcpy(&wide, &bits, sizeof wide);
  return wide;
}
static inline float widened(float wide) { return wide; }

// `search` for units without a faster one.
static inline void plain_search(const std::uint32_t* weights, const std::uint32_t* groups,
                                std::int64_t count, std::uint64_t spread, std::uint64_t total,
                                std::uint64_t bound, Place* place) {
  std::uint32_t prefix = 0;
  std::int64_t index = 0;
  for (; index + kRowGroup < count; index += kRowGroup) {
    const std::uint32_t next = prefix + groups[index / kRowGroup];
    if (next * spread + static_cast<std::uint64_t>(index + kRowGroup) * total >= bound) break;
    prefix = next;
  }
  for (; index + 1 < count; ++index) {
    const std::uint32_t next = prefix + weights[index];
    if (next * spread + static_cast<std::uint64_t>(index + 1) * total >= bound) break;
    prefix = next;
  }
  *place = {static_cast<std::int32_t>(index), prefix, weights[index]};
}

}  // namespace percov2
