// Integer attention with VNNI and VBMI: sixteen keys x four dimensions, or sixteen dimensions x
// four keys, per instruction.
//
// vpdpbusd multiplies unsigned by signed bytes and sums exactly. Queries enter as q + 128, and
// key_sum (-128 * sum of the key) corrects that; weights are already 0 .. 127.

#include <immintrin.h>

#include "transformer/attention_kernels.h"

namespace percov2 {
namespace {

struct WeightTable {
  __m512i low, high;

  WeightTable()
      : low(_mm512_loadu_si512(kAttentionWeights)),
        high(_mm512_loadu_si512(kAttentionWeights + 64)) {}
  // Of 64 distances that saturate at 255.
  inline __m512i operator()(__m512i distances) const {
    const __mmask64 near = ~_mm512_movepi8_mask(distances);  // below 128
    return _mm512_maskz_permutex2var_epi8(near, low, distances, high);
  }
};

// Distances of one row to each of four vectors -> bytes, quads of the same column side by side.
inline __m512i interleave(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i words = _mm512_packs_epi32(a, b);
  const __m512i more = _mm512_packs_epi32(c, d);
  const __m512i bytes = _mm512_packus_epi16(words, more);  // in each 16 bytes: a x4, b x4, ...
  const __m512i transposed = _mm512_set4_epi32(0x0F0B0703, 0x0E0A0602, 0x0D090501, 0x0C080400);
  return _mm512_shuffle_epi8(bytes, transposed);
}

// Scores of 4 rows x 16 columns.
template <int quads>
inline void score(const HeadKeys& keys, const HeadScores& scores, const std::int8_t* key,
                  const std::int32_t* sum, const std::int32_t* stage, const std::int32_t* bias,
                  __m512i reads, const std::int32_t* q, __m512i* out, __m512i* best) {
  const std::int64_t count = quads > 0 ? quads : keys.quads;
  const std::int64_t plane = keys.columns * kDimQuad;
  const std::int64_t line = count * plane;
  __m512i acc[kCellRows];
  const __m512i half = _mm512_set1_epi32(1 << (scores.shift - 1));
  for (int r = 0; r < kCellRows; ++r) {
    acc[r] = _mm512_add_epi32(_mm512_loadu_si512(sum + r * keys.columns), half);
  }
  // One pointer that walks keeps the addresses of all rows in registers.
#pragma GCC unroll 1
  for (std::int64_t c = 0; c < count; ++c, key += plane) {
    const __m512i same = _mm512_set1_epi32(q[c]);
    for (int r = 0; r < kCellRows; ++r) {
      acc[r] = _mm512_dpbusd_epi32(acc[r], same, _mm512_loadu_si512(key + r * line));
    }
  }
  const __m128i shift = _mm_cvtsi32_si128(scores.shift);
  const __m512i hidden = _mm512_set1_epi32(kHidden);
  for (int r = 0; r < kCellRows; ++r) {
    const __m512i add = _mm512_loadu_si512(bias + r * kBiasStride);
    const __m512i when = _mm512_loadu_si512(stage + r * keys.columns);
    const __mmask16 seen = _mm512_cmple_epi32_mask(when, reads);
    out[r] = _mm512_mask_add_epi32(hidden, seen, _mm512_sra_epi32(acc[r], shift), add);
    *best = _mm512_max_epi32(*best, out[r]);
  }
}

// Adds weight * value of 16 columns, [16][blocks][16 dimensions][4 rows].
template <int blocks>
inline void add_values(const std::int8_t* value, const std::uint8_t* weights, __mmask16 used,
                       __m512i (&sum)[2][blocks]) {
  constexpr std::int64_t depth = blocks * 64;
  const auto add = [&](std::int64_t column, __m512i(&to)[blocks]) {
    std::int32_t quad;
    __builtin_memcpy(&quad, weights + column * kCellRows, sizeof quad);
    const __m512i same = _mm512_set1_epi32(quad);
    for (int b = 0; b < blocks; ++b) {
      const __m512i v = _mm512_load_si512(value + column * depth + b * 64);
      to[b] = _mm512_dpbusd_epi32(to[b], same, v);
    }
  };
  if (__builtin_popcount(used) > 8) {
    for (std::int64_t column = 0; column < kCellColumns; column += 2) {
      add(column, sum[0]);
      add(column + 1, sum[1]);
    }
    return;
  }
  for (unsigned left = used; left != 0; left &= left - 1) add(__builtin_ctz(left), sum[0]);
}

// floor((2^b * sum + floor(total / 2)) / total) of sixteen dimensions. With 1/2 added to the
// numerator the quotient stays 1 / (2 total) > 2^-18 away from integers, so double is exact.
inline __m128i rounded_mean(__m512i sum, __m512d gain, __m512d half, __m512d inverse) {
  const auto eight = [&](__m256i part) {
    const __m512d numerator = _mm512_add_pd(_mm512_mul_pd(_mm512_cvtepi32_pd(part), gain), half);
    return _mm512_cvt_roundpd_epi32(_mm512_mul_pd(numerator, inverse),
                                    _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  };
  const __m256i low = eight(_mm512_castsi512_si256(sum));
  const __m256i high = eight(_mm512_extracti64x4_epi64(sum, 1));
  const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  return _mm_max_epi8(_mm512_cvtsepi32_epi8(both), _mm_set1_epi8(-127));
}

template <int quads, int blocks>
inline void attend_one(const HeadKeys& keys, const HeadScores& scores, const WeightTable& table,
                       const Sight& sight, const std::int8_t* q, std::int8_t* mean) {
  constexpr std::int64_t depth = blocks * 64;
  const std::int64_t dims = quads > 0 ? quads : keys.quads;
  std::int32_t lifted[kMaxHeadDim / kDimQuad];
  for (std::int64_t c = 0; c < dims; ++c) {
    std::int32_t quad;
    __builtin_memcpy(&quad, q + c * kDimQuad, sizeof quad);
    lifted[c] = quad ^ static_cast<std::int32_t>(0x80808080u);
  }
  const __m128i shift = _mm_cvtsi32_si128(scores.shift);

  // The start entries, in lanes 0 .. 2.
  const std::int8_t* start_key = keys.key + keys.rows * dims * keys.columns * kDimQuad;
  __m512i start = _mm512_add_epi32(_mm512_loadu_si512(keys.key_sum + keys.rows * keys.columns),
                                   _mm512_set1_epi32(1 << (scores.shift - 1)));
  for (std::int64_t c = 0; c < dims; ++c) {
    start = _mm512_dpbusd_epi32(start, _mm512_set1_epi32(lifted[c]),
                                _mm512_loadu_si512(start_key + c * kCellColumns * kDimQuad));
  }
  start = _mm512_add_epi32(_mm512_sra_epi32(start, shift), _mm512_loadu_si512(scores.start));
  start = _mm512_mask_mov_epi32(_mm512_set1_epi32(kHidden), 7, start);

  __m512i score_of[kMostGroups * kMostVectors][kCellRows];
  std::int32_t group_of[kMostGroups];
  std::int64_t groups = 0;
  __m512i top = start;
  const __m512i reads = _mm512_set1_epi32(sight.reads);
  for (std::int64_t g = 0; g < sight.groups; ++g) {
    const std::int64_t row = sight.first_row + g * kCellRows;
    if (keys.first_stage[row / kCellRows] > sight.reads) continue;
    for (std::int64_t n = 0; n < sight.vectors; ++n) {
      const std::int64_t column = sight.first_column + n * kCellColumns;
      const std::int64_t cell = row * keys.columns + column;
      score<quads>(keys, scores, keys.key + (row * dims * keys.columns + column) * kDimQuad,
                   keys.key_sum + cell, keys.stage + cell,
                   scores.window + sight.bias + g * kCellRows * kBiasStride + n * kCellColumns,
                   reads, lifted, score_of[groups * sight.vectors + n], &top);
    }
    group_of[groups++] = static_cast<std::int32_t>(row / kCellRows);
  }
  const __m512i best = _mm512_set1_epi32(_mm512_reduce_max_epi32(top));

  const __m512i ones = _mm512_set1_epi8(1);
  __m512i sum[2][blocks];
  for (auto& half : sum) {
    for (int b = 0; b < blocks; ++b) half[b] = _mm512_setzero_si512();
  }
  // Lanes 0 .. 2 become the first quad of bytes: one column of four rows.
  const __m128i near = _mm512_cvtusepi32_epi8(_mm512_sub_epi32(best, start));
  const __m512i start_weight = table(_mm512_zextsi128_si512(near));
  // The lanes from 3 on are hidden, so bytes beyond the first quad are 0.
  const __m512i first = _mm512_broadcastd_epi32(_mm512_castsi512_si128(start_weight));
  __m512i totals = _mm512_maskz_dpbusd_epi32(1, _mm512_setzero_si512(), start_weight, ones);
  const std::int8_t* start_value = keys.value + keys.rows / kCellRows * keys.columns * depth;
  for (int b = 0; b < blocks; ++b) {
    sum[0][b] = _mm512_dpbusd_epi32(sum[0][b], first, _mm512_load_si512(start_value + b * 64));
  }
  for (std::int64_t n = 0; n < groups; ++n) {
    for (std::int64_t part = 0; part < sight.vectors; ++part) {
      const __m512i* s = score_of[n * sight.vectors + part];
      const __m512i distances =
          interleave(_mm512_sub_epi32(best, s[0]), _mm512_sub_epi32(best, s[1]),
                     _mm512_sub_epi32(best, s[2]), _mm512_sub_epi32(best, s[3]));
      const __m512i weights = table(distances);
      totals = _mm512_dpbusd_epi32(totals, weights, ones);
      const __mmask16 used = _mm512_test_epi32_mask(weights, weights);
      if (used == 0) continue;
      alignas(64) std::uint8_t bytes[64];
      _mm512_store_si512(bytes, weights);
      const std::int64_t column = sight.first_column + part * kCellColumns;
      add_values<blocks>(keys.value + (group_of[n] * keys.columns + column) * depth, bytes, used,
                         sum);
    }
  }
  const std::int32_t total = _mm512_reduce_add_epi32(totals);
  const __m512d gain = _mm512_set1_pd(static_cast<double>(1 << scores.gain_bits));
  const __m512d half = _mm512_set1_pd(static_cast<double>(total / 2) + 0.5);
  const __m512d inverse = _mm512_set1_pd(1.0 / static_cast<double>(total));
  for (int b = 0; b < blocks; ++b) {
    const __m128i bytes = rounded_mean(_mm512_add_epi32(sum[0][b], sum[1][b]), gain, half, inverse);
    const std::int64_t left = keys.head_dim - b * 16;
    const auto mask = static_cast<__mmask16>(left >= 16 ? 0xFFFF : (1 << left) - 1);
    _mm_mask_storeu_epi8(mean + b * 16, mask, bytes);
  }
}

template <int quads, int blocks>
void attend_all(const HeadKeys& keys, const HeadScores& scores, const Sight* sights,
                std::int64_t readers, const std::int8_t* q, std::int64_t q_stride,
                std::int8_t* mean, std::int64_t mean_stride) {
  const WeightTable table;
  for (std::int64_t i = 0; i < readers; ++i) {
    attend_one<quads, blocks>(keys, scores, table, sights[i], q + i * q_stride,
                              mean + i * mean_stride);
  }
}

void attend(const HeadKeys& keys, const HeadScores& scores, const Sight* sights,
            std::int64_t readers, const std::int8_t* q, std::int64_t q_stride, std::int8_t* mean,
            std::int64_t mean_stride) {
  constexpr decltype(&attend_all<0, 1>) kByBlocks[] = {attend_all<0, 1>, attend_all<0, 2>,
                                                       attend_all<0, 3>, attend_all<0, 4>};
  const auto kernel = keys.quads == 8 ? attend_all<8, 2> : kByBlocks[keys.value_blocks - 1];
  kernel(keys, scores, sights, readers, q, q_stride, mean, mean_stride);
}

void weigh(const std::int32_t* distances, std::int64_t count, std::uint8_t* weights) {
  const WeightTable table;
  for (std::int64_t i = 0; i < count; i += 16) {
    const std::int64_t left = count - i;
    const auto mask = static_cast<__mmask16>(left >= 16 ? 0xFFFF : (1 << left) - 1);
    const __m512i some = _mm512_maskz_loadu_epi32(mask, distances + i);
    const __m512i rows = interleave(some, some, some, some);
    _mm_mask_storeu_epi8(weights + i, mask, _mm512_cvtepi32_epi8(table(rows)));
  }
}

}  // namespace

const AttentionKernels kAttentionAvx512 = {attend, weigh};

}  // namespace percov2
