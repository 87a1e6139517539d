// Integer attention with baseline NEON: sixteen keys x eight dimensions, or sixteen dimensions x
// two columns of four keys, per step of neon_products.h.

#include <arm_neon.h>

#include <cstddef>

#include "transformer/attention_kernels.h"
#include "transformer/neon_products.h"

namespace percov2 {
namespace {

// kAttentionWeights in registers.
struct Weights {
  uint8x16x4_t first, second;

  Weights() {
    for (int p = 0; p < 4; ++p) {
      first.val[p] = vld1q_u8(kAttentionWeights + p * 16);
      second.val[p] = vld1q_u8(kAttentionWeights + 64 + p * 16);
    }
  }
  // Of sixteen distances; 0 from 128 on.
  uint8x16_t of(uint8x16_t distance) const {
    return vqtbx4q_u8(vqtbl4q_u8(first, distance), second, vsubq_u8(distance, vdupq_n_u8(64)));
  }
};

inline uint16x4_t narrowed(int32x4_t distance) {
  return vqmovn_u32(vreinterpretq_u32_s32(distance));
}

// Weights of 4 rows x 4 columns of distances >= 0: bytes, the rows of a column side by side.
inline uint8x16_t interleaved_weights(const Weights& weights, int32x4_t a, int32x4_t b, int32x4_t c,
                                      int32x4_t d) {
  constexpr std::uint8_t kTransposed[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
  const uint8x16_t rows = vcombine_u8(vqmovn_u16(vcombine_u16(narrowed(a), narrowed(b))),
                                      vqmovn_u16(vcombine_u16(narrowed(c), narrowed(d))));
  return weights.of(vqtbl1q_u8(rows, vld1q_u8(kTransposed)));
}

// A column of four keys, not all of weight 0, and the values of its cells.
struct Column {
  std::int8_t weight[4];
  const std::int8_t* value;
};

// The weighted sums of sixteen dimensions from `at` on.
inline void weighted_sums(const Column* columns, std::int64_t count, std::int64_t at,
                          int32x4_t (&out)[4]) {
  NeonHalves sum[4];
  for (NeonHalves& part : sum) part = {vdupq_n_s32(0), vdupq_n_s32(0)};
  std::int64_t n = 0;
  for (; n + 2 <= count; n += 2) {
    const int8x16_t one = neon_same_quad(columns[n].weight);
    const int8x16_t two = neon_same_quad(columns[n + 1].weight);
    const std::int8_t* v = columns[n].value + at * kCellRows;
    const std::int8_t* v2 = columns[n + 1].value + at * kCellRows;
    for (int p = 0; p < 4; ++p) {
      neon_add_two(sum[p], vld1q_s8(v + p * 16), one, vld1q_s8(v2 + p * 16), two);
    }
  }
  if (n < count) {
    const int8x16_t one = neon_same_quad(columns[n].weight);
    for (int p = 0; p < 4; ++p) {
      neon_add(sum[p], vld1q_s8(columns[n].value + at * kCellRows + p * 16), one);
    }
  }
  for (int p = 0; p < 4; ++p) out[p] = neon_total(sum[p]);
}

// attention_avx512.cpp proves that the quotients are exact.
inline int16x4_t rounded_mean(int32x4_t sum, float64x2_t gain, float64x2_t half,
                              float64x2_t inverse) {
  const auto two = [&](int32x2_t part) {
    const float64x2_t product = vmulq_f64(vcvtq_f64_s64(vmovl_s32(part)), gain);
    return vmovn_s64(vcvtmq_s64_f64(vmulq_f64(vaddq_f64(product, half), inverse)));
  };
  return vqmovn_s32(vcombine_s32(two(vget_low_s32(sum)), two(vget_high_s32(sum))));
}

// Four rows x sixteen columns of scores, four columns to a vector.
struct Scores {
  int32x4_t part[kCellRows][4];
};

void attend_one(const Weights& weights, const HeadKeys& keys, const HeadScores& scores,
                const Sight& sight, const std::int8_t* q, std::int8_t* mean) {
  const std::int64_t depth = keys.value_blocks * 16 * kCellRows;  // bytes of a column of a group
  const std::int64_t plane = keys.columns * kDimQuad;
  const std::int64_t line = keys.quads * plane;
  const std::int8_t* const query[1] = {q};
  const int32x4_t half_score = vdupq_n_s32(1 << (scores.shift - 1));
  const int32x4_t down = vdupq_n_s32(-scores.shift);
  const int32x4_t hidden = vdupq_n_s32(kHidden);
  const int32x4_t reads = vdupq_n_s32(sight.reads);
  int32x4_t sums[1][4];

  // The start entries, in lanes 0 .. 2.
  neon_sixteen_sums<1>(keys.key + keys.rows * line, kCellColumns * kDimQuad, keys.quads, query,
                       sums);
  int32x4_t start =
      vaddq_s32(vshlq_s32(vaddq_s32(sums[0][0], half_score), down), vld1q_s32(scores.start));
  start = vsetq_lane_s32(kHidden, start, 3);

  Scores score_of[kMostGroups * kMostVectors];
  std::int64_t group_of[kMostGroups];
  std::int64_t groups = 0;
  int32x4_t top = start;
  for (std::int64_t g = 0; g < sight.groups; ++g) {
    const std::int64_t row = sight.first_row + g * kCellRows;
    if (keys.first_stage[row / kCellRows] > sight.reads) continue;
    for (std::int64_t n = 0; n < sight.vectors; ++n) {
      const std::int64_t column = sight.first_column + n * kCellColumns;
      Scores& to = score_of[groups * sight.vectors + n];
      for (std::int64_t r = 0; r < kCellRows; ++r) {
        neon_sixteen_sums<1>(keys.key + (row + r) * line + column * kDimQuad, plane, keys.quads,
                             query, sums);
        const std::int32_t* stage = keys.stage + (row + r) * keys.columns + column;
        const std::int32_t* bias =
            scores.window + sight.bias + (g * kCellRows + r) * kBiasStride + n * kCellColumns;
        for (int p = 0; p < 4; ++p) {
          const int32x4_t score = vaddq_s32(vshlq_s32(vaddq_s32(sums[0][p], half_score), down),
                                            vld1q_s32(bias + p * 4));
          const uint32x4_t later = vcgtq_s32(vld1q_s32(stage + p * 4), reads);
          to.part[r][p] = vbslq_s32(later, hidden, score);
          top = vmaxq_s32(top, to.part[r][p]);
        }
      }
    }
    group_of[groups++] = row / kCellRows;
  }
  const int32x4_t best = vdupq_n_s32(vmaxvq_s32(top));

  Column columns[1 + kMostGroups * kMostVectors * kCellColumns];
  std::int64_t count = 1;
  const auto away = [&](int32x4_t score) { return vsubq_s32(best, score); };
  // Lanes 0 .. 2 become the first quad: one column of four rows.
  const uint16x8_t near = vcombine_u16(narrowed(away(start)), vdup_n_u16(255));
  const uint8x16_t first = weights.of(vcombine_u8(vqmovn_u16(near), vdup_n_u8(255)));
  std::int32_t total = vaddlvq_u8(first);
  const std::int32_t first_quad = vgetq_lane_s32(vreinterpretq_s32_u8(first), 0);
  __builtin_memcpy(columns[0].weight, &first_quad, sizeof first_quad);
  columns[0].value = keys.value + keys.rows / kCellRows * keys.columns * depth;
  for (std::int64_t n = 0; n < groups * sight.vectors; ++n) {
    const Scores& s = score_of[n];
    const std::int8_t* value =
        keys.value + (group_of[n / sight.vectors] * keys.columns + sight.first_column +
                      n % sight.vectors * kCellColumns) *
                         depth;
    for (int p = 0; p < 4; ++p) {
      const uint8x16_t quads = interleaved_weights(weights, away(s.part[0][p]), away(s.part[1][p]),
                                                   away(s.part[2][p]), away(s.part[3][p]));
      total += vaddlvq_u8(quads);
      std::int8_t bytes[16];
      vst1q_s8(bytes, vreinterpretq_s8_u8(quads));
      for (int c = 0; c < 4; ++c) {
        std::int32_t quad;
        __builtin_memcpy(&quad, bytes + c * 4, sizeof quad);
        if (quad == 0) continue;
        __builtin_memcpy(columns[count].weight, &quad, sizeof quad);
        columns[count++].value = value + (p * 4 + c) * depth;
      }
    }
  }

  const float64x2_t gain = vdupq_n_f64(static_cast<double>(1 << scores.gain_bits));
  const float64x2_t half = vdupq_n_f64(static_cast<double>(total / 2) + 0.5);
  const float64x2_t inverse = vdupq_n_f64(1.0 / static_cast<double>(total));
  std::int8_t bytes[kMaxHeadDim];
  for (std::int64_t at = 0; at < keys.value_blocks * 16; at += 16) {
    int32x4_t sum[4];
    weighted_sums(columns, count, at, sum);
    for (int p = 0; p < 4; p += 2) {
      const int16x8_t means = vcombine_s16(rounded_mean(sum[p], gain, half, inverse),
                                           rounded_mean(sum[p + 1], gain, half, inverse));
      vst1_s8(bytes + at + p * 4, vmax_s8(vqmovn_s16(means), vdup_n_s8(-127)));
    }
  }
  __builtin_memcpy(mean, bytes, static_cast<std::size_t>(keys.head_dim));
}

void attend(const HeadKeys& keys, const HeadScores& scores, const Reader* readers,
            std::int64_t count) {
  const Weights weights;
  for (std::int64_t i = 0; i < count; ++i) {
    attend_one(weights, keys, scores, readers[i].sight, readers[i].q, readers[i].mean);
  }
}

void weigh(const std::int32_t* distances, std::int64_t count, std::uint8_t* weights) {
  const Weights table;
  for (std::int64_t i = 0; i < count; ++i) {
    const uint16x4_t words = narrowed(vdupq_n_s32(distances[i]));
    const uint8x8_t bytes = vqmovn_u16(vcombine_u16(words, words));
    weights[i] = vgetq_lane_u8(table.of(vcombine_u8(bytes, bytes)), 0);
  }
}

}  // namespace

const AttentionKernels kAttentionNeon = {attend, weigh, false};

}  // namespace percov2
