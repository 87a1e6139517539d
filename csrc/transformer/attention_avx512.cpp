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

// What `count` readers of the same cells have apart.
template <int count>
struct Readers {
  const std::int32_t* bias[count];  // of the first cell
  __m512i reads[count];
  std::int32_t q[count][kMaxHeadDim / kDimQuad];  // q + 128
  __m512i best[count];
};

// Scores of 4 rows x 16 columns for each reader. Loads of keys limit the speed, so that two readers
// take little longer than one.
template <int quads, int count>
inline void score(const HeadKeys& keys, const HeadScores& scores, const std::int8_t* key,
                  const std::int32_t* sum, const std::int32_t* stage, std::int64_t bias,
                  Readers<count>& readers, __m512i (&out)[count][kCellRows]) {
  const std::int64_t dims = quads > 0 ? quads : keys.quads;
  const std::int64_t plane = keys.columns * kDimQuad;
  const std::int64_t line = dims * plane;
  __m512i acc[count][kCellRows];
  const __m512i half = _mm512_set1_epi32(1 << (scores.shift - 1));
  for (int r = 0; r < kCellRows; ++r) {
    const __m512i begin = _mm512_add_epi32(_mm512_loadu_si512(sum + r * keys.columns), half);
    for (int i = 0; i < count; ++i) acc[i][r] = begin;
  }
  // One pointer that walks keeps the addresses of all rows in registers.
#pragma GCC unroll 1
  for (std::int64_t c = 0; c < dims; ++c, key += plane) {
    __m512i same[count];
    for (int i = 0; i < count; ++i) same[i] = _mm512_set1_epi32(readers.q[i][c]);
    for (int r = 0; r < kCellRows; ++r) {
      const __m512i part = _mm512_loadu_si512(key + r * line);
      for (int i = 0; i < count; ++i) acc[i][r] = _mm512_dpbusd_epi32(acc[i][r], same[i], part);
    }
  }
  const __m128i shift = _mm_cvtsi32_si128(scores.shift);
  const __m512i hidden = _mm512_set1_epi32(kHidden);
  for (int r = 0; r < kCellRows; ++r) {
    const __m512i when = _mm512_loadu_si512(stage + r * keys.columns);
    for (int i = 0; i < count; ++i) {
      const __m512i add = _mm512_loadu_si512(readers.bias[i] + bias + r * kBiasStride);
      const __mmask16 seen = _mm512_cmple_epi32_mask(when, readers.reads[i]);
      out[i][r] = _mm512_mask_add_epi32(hidden, seen, _mm512_sra_epi32(acc[i][r], shift), add);
      readers.best[i] = _mm512_max_epi32(readers.best[i], out[i][r]);
    }
  }
}

// Adds weight * value of 16 columns, [16][blocks][16 dimensions][4 rows], for each reader.
template <int blocks, int count>
inline void add_values(const std::int8_t* value, const std::uint8_t (&weights)[count][64],
                       __mmask16 used, __m512i (&sum)[2][count][blocks]) {
  constexpr std::int64_t depth = blocks * 64;
  const auto add = [&](std::int64_t column, __m512i(&to)[count][blocks]) {
    __m512i same[count];
    for (int i = 0; i < count; ++i) {
      std::int32_t quad;
      __builtin_memcpy(&quad, weights[i] + column * kCellRows, sizeof quad);
      same[i] = _mm512_set1_epi32(quad);
    }
    for (int b = 0; b < blocks; ++b) {
      const __m512i v = _mm512_load_si512(value + column * depth + b * 64);
      for (int i = 0; i < count; ++i) to[i][b] = _mm512_dpbusd_epi32(to[i][b], same[i], v);
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

// Readers of the same cells: their sights differ in `reads` and `bias` only.
template <int quads, int blocks, int count>
inline void attend_some(const HeadKeys& keys, const HeadScores& scores, const WeightTable& table,
                        const Reader* read) {
  constexpr std::int64_t depth = blocks * 64;
  const std::int64_t dims = quads > 0 ? quads : keys.quads;
  const Sight& sight = read[0].sight;
  const __m128i shift = _mm_cvtsi32_si128(scores.shift);
  const std::int8_t* start_key = keys.key + keys.rows * dims * keys.columns * kDimQuad;
  Readers<count> readers;
  __m512i start[count];
  std::int32_t latest = sight.reads;
  for (int i = 0; i < count; ++i) {
    readers.bias[i] = scores.window + read[i].sight.bias;
    readers.reads[i] = _mm512_set1_epi32(read[i].sight.reads);
    if (read[i].sight.reads > latest) latest = read[i].sight.reads;
    // The start entries, in lanes 0 .. 2.
    start[i] = _mm512_add_epi32(_mm512_loadu_si512(keys.key_sum + keys.rows * keys.columns),
                                _mm512_set1_epi32(1 << (scores.shift - 1)));
    for (std::int64_t c = 0; c < dims; ++c) {
      std::int32_t quad;
      __builtin_memcpy(&quad, read[i].q + c * kDimQuad, sizeof quad);
      readers.q[i][c] = quad ^ static_cast<std::int32_t>(0x80808080u);
      start[i] = _mm512_dpbusd_epi32(start[i], _mm512_set1_epi32(readers.q[i][c]),
                                     _mm512_loadu_si512(start_key + c * kCellColumns * kDimQuad));
    }
    start[i] =
        _mm512_add_epi32(_mm512_sra_epi32(start[i], shift), _mm512_loadu_si512(scores.start));
    start[i] = _mm512_mask_mov_epi32(_mm512_set1_epi32(kHidden), 7, start[i]);
    readers.best[i] = start[i];
  }

  __m512i score_of[kMostGroups * kMostVectors][count][kCellRows];
  std::int32_t group_of[kMostGroups];
  std::int64_t groups = 0;
  for (std::int64_t g = 0; g < sight.groups; ++g) {
    const std::int64_t row = sight.first_row + g * kCellRows;
    if (keys.first_stage[row / kCellRows] > latest) continue;
    for (std::int64_t n = 0; n < sight.vectors; ++n) {
      const std::int64_t column = sight.first_column + n * kCellColumns;
      const std::int64_t cell = row * keys.columns + column;
      score<quads, count>(keys, scores, keys.key + (row * dims * keys.columns + column) * kDimQuad,
                          keys.key_sum + cell, keys.stage + cell,
                          g * kCellRows * kBiasStride + n * kCellColumns, readers,
                          score_of[groups * sight.vectors + n]);
    }
    group_of[groups++] = static_cast<std::int32_t>(row / kCellRows);
  }

  const __m512i ones = _mm512_set1_epi8(1);
  const std::int8_t* start_value = keys.value + keys.rows / kCellRows * keys.columns * depth;
  __m512i best[count], totals[count], sum[2][count][blocks];
  for (int i = 0; i < count; ++i) {
    best[i] = _mm512_set1_epi32(_mm512_reduce_max_epi32(readers.best[i]));
    // Lanes 0 .. 2 become the first quad of bytes: one column of four rows.
    const __m128i near = _mm512_cvtusepi32_epi8(_mm512_sub_epi32(best[i], start[i]));
    const __m512i weight = table(_mm512_zextsi128_si512(near));
    // The lanes from 3 on are hidden, so bytes beyond the first quad are 0.
    const __m512i first = _mm512_broadcastd_epi32(_mm512_castsi512_si128(weight));
    totals[i] = _mm512_maskz_dpbusd_epi32(1, _mm512_setzero_si512(), weight, ones);
    for (int b = 0; b < blocks; ++b) {
      sum[0][i][b] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), first,
                                         _mm512_load_si512(start_value + b * 64));
      sum[1][i][b] = _mm512_setzero_si512();
    }
  }
  for (std::int64_t n = 0; n < groups; ++n) {
    for (std::int64_t part = 0; part < sight.vectors; ++part) {
      alignas(64) std::uint8_t bytes[count][64];
      __mmask16 used = 0;
      for (int i = 0; i < count; ++i) {
        const __m512i* s = score_of[n * sight.vectors + part][i];
        const __m512i distances =
            interleave(_mm512_sub_epi32(best[i], s[0]), _mm512_sub_epi32(best[i], s[1]),
                       _mm512_sub_epi32(best[i], s[2]), _mm512_sub_epi32(best[i], s[3]));
        const __m512i weights = table(distances);
        totals[i] = _mm512_dpbusd_epi32(totals[i], weights, ones);
        used = static_cast<__mmask16>(used | _mm512_test_epi32_mask(weights, weights));
        _mm512_store_si512(bytes[i], weights);
      }
      if (used == 0) continue;
      const std::int64_t column = sight.first_column + part * kCellColumns;
      add_values<blocks, count>(keys.value + (group_of[n] * keys.columns + column) * depth, bytes,
                                used, sum);
    }
  }
  const __m512d gain = _mm512_set1_pd(static_cast<double>(1 << scores.gain_bits));
  for (int i = 0; i < count; ++i) {
    const std::int32_t total = _mm512_reduce_add_epi32(totals[i]);
    const __m512d half = _mm512_set1_pd(static_cast<double>(total / 2) + 0.5);
    const __m512d inverse = _mm512_set1_pd(1.0 / static_cast<double>(total));
    for (int b = 0; b < blocks; ++b) {
      const __m128i bytes =
          rounded_mean(_mm512_add_epi32(sum[0][i][b], sum[1][i][b]), gain, half, inverse);
      const std::int64_t left = keys.head_dim - b * 16;
      const auto mask = static_cast<__mmask16>(left >= 16 ? 0xFFFF : (1 << left) - 1);
      _mm_mask_storeu_epi8(read[i].mean + b * 16, mask, bytes);
    }
  }
}

inline bool same_cells(const Sight& a, const Sight& b) {
  return a.first_row == b.first_row && a.groups == b.groups && a.first_column == b.first_column &&
         a.vectors == b.vectors;
}

template <int quads, int blocks>
void attend_all(const HeadKeys& keys, const HeadScores& scores, const Reader* readers,
                std::int64_t count) {
  const WeightTable table;
  for (std::int64_t i = 0; i < count;) {
    if (i + 1 < count && same_cells(readers[i].sight, readers[i + 1].sight)) {
      attend_some<quads, blocks, 2>(keys, scores, table, readers + i);
      i += 2;
    } else {
      attend_some<quads, blocks, 1>(keys, scores, table, readers + i);
      i += 1;
    }
  }
}

void attend(const HeadKeys& keys, const HeadScores& scores, const Reader* readers,
            std::int64_t count) {
  constexpr decltype(&attend_all<0, 1>) kByBlocks[] = {attend_all<0, 1>, attend_all<0, 2>,
                                                       attend_all<0, 3>, attend_all<0, 4>};
  const auto kernel = keys.quads == 8 ? attend_all<8, 2> : kByBlocks[keys.value_blocks - 1];
  kernel(keys, scores, readers, count);
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

const AttentionKernels kAttentionAvx512 = {attend, weigh, true};

}  // namespace percov2
