// Integer attention, key by key.

#include "transformer/attention_kernels.h"

namespace percov2 {

const std::uint8_t kAttentionWeights[128] = {
    127, 121, 116, 111, 106, 102, 98, 93, 90, 86, 82, 79, 75, 72, 69, 66, 63, 61, 58, 56, 53, 51,
    49,  47,  45,  43,  41,  39,  38, 36, 35, 33, 32, 30, 29, 28, 27, 25, 24, 23, 22, 21, 21, 20,
    19,  18,  17,  17,  16,  15,  15, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9,  9,  9,  8,  8,  8,
    7,   7,   7,   6,   6,   6,   6,  5,  5,  5,  5,  5,  4,  4,  4,  4,  4,  3,  3,  3,  3,  3,
    3,   3,   3,   2,   2,   2,   2,  2,  2,  2,  2,  2,  2,  2,  2,  1,  1,  1,  1,  1,  1,  1,
    1,   1,   1,   1,   1,   1,   1,  1,  1,  1,  1,  1,  1,  1,  1,  1,  1,  1};

namespace {

inline std::int32_t weight_of(std::int32_t distance) {
  return distance < 128 ? kAttentionWeights[distance] : 0;
}

// A visible key: its score and the values of its cell, four bytes apart.
struct Seen {
  std::int32_t score;
  const std::int8_t* value;
};

// The score of a key whose quads of dimensions are `step` bytes apart.
std::int32_t score_of(const HeadKeys& keys, const HeadScores& scores, const std::int8_t* q,
                      const std::int8_t* key, std::int64_t step, std::int32_t bias) {
  std::int32_t dot = 0;
  for (std::int64_t c = 0; c < keys.head_dim; ++c) {
    dot += q[c] * key[c / kDimQuad * step + c % kDimQuad];
  }
  return ((dot + (1 << (scores.shift - 1))) >> scores.shift) + bias;
}

std::int8_t rounded_mean(std::int32_t sum, std::int32_t total, std::int32_t gain_bits) {
  // |sum| <= 127 * total and total <= 964 * 127: the numerator is in [0, 2^31).
  const std::int64_t numerator =
      std::int64_t{sum} * (1 << gain_bits) + (std::int64_t{total} << (7 + gain_bits)) + total / 2;
  const std::int64_t mean = numerator / total - (128 << gain_bits);
  return static_cast<std::int8_t>(mean < -127 ? -127 : mean > 127 ? 127 : mean);
}

void attend_one(const HeadKeys& keys, const HeadScores& scores, const Sight& sight,
                const std::int8_t* q, std::int8_t* mean) {
  Seen seen[kStartEntries + kMostGroups * kCellRows * kMostVectors * kCellColumns];
  std::int64_t count = 0;
  const std::int64_t depth = keys.value_blocks * 16 * kCellRows;  // bytes of a column of a group
  const std::int8_t* start_key = keys.key + keys.rows * keys.quads * keys.columns * kDimQuad;
  const std::int8_t* start_value = keys.value + keys.rows / kCellRows * keys.columns * depth;
  for (std::int64_t s = 0; s < kStartEntries; ++s) {
    seen[count++] = {score_of(keys, scores, q, start_key + s * kDimQuad, kCellColumns * kDimQuad,
                              scores.start[s]),
                     start_value + s};
  }
  for (std::int64_t line = 0; line < sight.groups * kCellRows; ++line) {
    const std::int64_t row = sight.first_row + line;
    for (std::int64_t i = 0; i < sight.vectors * kCellColumns; ++i) {
      const std::int64_t column = sight.first_column + i;
      const std::int32_t bias = scores.window[sight.bias + line * kBiasStride + i];
      if (keys.stage[row * keys.columns + column] > sight.reads || bias <= kHidden) continue;
      const std::int8_t* key = keys.key + (row * keys.quads * keys.columns + column) * kDimQuad;
      const std::int8_t* value =
          keys.value + (row / kCellRows * keys.columns + column) * depth + row % kCellRows;
      seen[count++] = {score_of(keys, scores, q, key, keys.columns * kDimQuad, bias), value};
    }
  }
  std::int32_t best = seen[0].score;
  for (std::int64_t n = 1; n < count; ++n) best = seen[n].score > best ? seen[n].score : best;
  std::int32_t total = 0;
  std::int32_t sum[kMaxHeadDim] = {};
  for (std::int64_t n = 0; n < count; ++n) {
    const std::int32_t weight = weight_of(best - seen[n].score);
    if (weight == 0) continue;
    total += weight;
    for (std::int64_t c = 0; c < keys.head_dim; ++c) {
      sum[c] += weight * seen[n].value[c * kCellRows];
    }
  }
  for (std::int64_t c = 0; c < keys.head_dim; ++c) {
    mean[c] = rounded_mean(sum[c], total, scores.gain_bits);
  }
}

void attend(const HeadKeys& keys, const HeadScores& scores, const Reader* readers,
            std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    attend_one(keys, scores, readers[i].sight, readers[i].q, readers[i].mean);
  }
}

void weigh(const std::int32_t* distances, std::int64_t count, std::uint8_t* weights) {
  for (std::int64_t i = 0; i < count; ++i) {
    weights[i] = static_cast<std::uint8_t>(weight_of(distances[i]));
  }
}

}  // namespace

const AttentionKernels kAttentionScalar = {attend, weigh, false};

}  // namespace percov2
