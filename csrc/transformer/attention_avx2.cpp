// Integer attention with AVX2: eight keys x four dimensions, or eight dimensions x four keys, per
// instruction.
//
// vpmaddubsw multiplies unsigned by signed bytes and adds two products in int16; it saturates, but
// 2 * 127 * 127 < 2^15. For scores the signs of q move to the keys; weights are 0 .. 127 anyway.

#include <immintrin.h>

#include <cstddef>

#include "transformer/attention_kernels.h"

namespace percov2 {
namespace {

inline __m256i load(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}

// Quads of products of unsigned and signed bytes, summed: eight int32.
inline __m256i quads_of(__m256i magnitude, __m256i factor) {
  return _mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, factor), _mm256_set1_epi16(1));
}

// Softmax weights of sixteen distances >= 0: floor(126.61 * 2^(-d/16) + 1/2) is the rounded product
// of round(256 * 126.61 * 2^(-(d mod 16)/16)) and 2^-(8 + d div 16); a test compares all of them.
inline __m256i weights_of(__m256i distance) {
  const __m256i low = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(-100, 62, 26, 46, 119, -12, -95, 126, -121, -69, 25, -98, 72, 23, 9, 28));
  const __m256i high = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(126, 121, 116, 111, 106, 101, 97, 93, 89, 85, 82, 78, 75, 72, 69, 66));
  const __m256i scale = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(-128, 64, 32, 16, 8, 4, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0));
  const __m256i d = _mm256_min_epi16(distance, _mm256_set1_epi16(255));
  const __m256i fraction = _mm256_and_si256(d, _mm256_set1_epi16(15));
  // vpshufb writes 0 for a set top bit, so it looks up only one byte of each pair.
  const __m256i upper_off = _mm256_set1_epi16(static_cast<short>(0x8000));
  const __m256i lower_off = _mm256_set1_epi16(0x0080);
  const __m256i mantissa = _mm256_or_si256(
      _mm256_shuffle_epi8(low, _mm256_or_si256(fraction, upper_off)),
      _mm256_shuffle_epi8(high, _mm256_or_si256(_mm256_slli_epi16(fraction, 8), lower_off)));
  const __m256i octave = _mm256_or_si256(_mm256_srli_epi16(d, 4), upper_off);
  return _mm256_mulhrs_epi16(mantissa, _mm256_shuffle_epi8(scale, octave));
}

// Weights of 4 rows x 8 columns of distances: bytes, the rows of a column side by side.
inline __m256i interleaved_weights(__m256i a, __m256i b, __m256i c, __m256i d) {
  const __m256i first = weights_of(_mm256_packs_epi32(a, b));
  const __m256i second = weights_of(_mm256_packs_epi32(c, d));
  const __m256i bytes = _mm256_packus_epi16(first, second);  // in 16 bytes: a x4, b x4, c x4, d x4
  const __m256i transposed = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  return _mm256_shuffle_epi8(bytes, transposed);
}

struct Query {
  std::int32_t quad[kMaxHeadDim / kDimQuad];
};

// Adds the products with 8 keys at `key`, whose quads are `plane` bytes apart.
inline __m256i dot(const std::int8_t* key, std::int64_t plane, std::int64_t quads, const Query& q) {
  __m256i acc = _mm256_setzero_si256();
  for (std::int64_t c = 0; c < quads; ++c) {
    const __m256i same = _mm256_set1_epi32(q.quad[c]);
    const __m256i k = _mm256_sign_epi8(load(key + c * plane), same);
    acc = _mm256_add_epi32(acc, quads_of(_mm256_abs_epi8(same), k));
  }
  return acc;
}

struct Scaling {
  __m256i half;
  __m128i shift;
  inline __m256i operator()(__m256i products) const {
    return _mm256_sra_epi32(_mm256_add_epi32(products, half), shift);
  }
};

// Scores of 4 rows x 8 columns.
inline void score(const HeadKeys& keys, const Scaling& scaled, const std::int8_t* key,
                  const std::int32_t* stage, const std::int32_t* bias, __m256i reads,
                  const Query& q, __m256i* out, __m256i* best) {
  const std::int64_t plane = keys.columns * kDimQuad;
  const std::int64_t line = keys.quads * plane;
  __m256i acc[kCellRows];
  for (__m256i& sum : acc) sum = _mm256_setzero_si256();
  for (std::int64_t c = 0; c < keys.quads; ++c) {
    const __m256i same = _mm256_set1_epi32(q.quad[c]);
    const __m256i magnitude = _mm256_abs_epi8(same);
    for (int r = 0; r < kCellRows; ++r) {
      const __m256i k = _mm256_sign_epi8(load(key + r * line + c * plane), same);
      acc[r] = _mm256_add_epi32(acc[r], quads_of(magnitude, k));
    }
  }
  const __m256i hidden = _mm256_set1_epi32(kHidden);
  for (int r = 0; r < kCellRows; ++r) {
    const __m256i sum = _mm256_add_epi32(scaled(acc[r]), load(bias + r * kBiasStride));
    const __m256i later = _mm256_cmpgt_epi32(load(stage + r * keys.columns), reads);
    out[r] = _mm256_blendv_epi8(sum, hidden, later);
    *best = _mm256_max_epi32(*best, out[r]);
  }
}

inline std::int32_t maximum(__m256i value) {
  __m128i best = _mm_max_epi32(_mm256_castsi256_si128(value), _mm256_extracti128_si256(value, 1));
  best = _mm_max_epi32(best, _mm_shuffle_epi32(best, _MM_SHUFFLE(1, 0, 3, 2)));
  best = _mm_max_epi32(best, _mm_shuffle_epi32(best, _MM_SHUFFLE(2, 3, 0, 1)));
  return _mm_cvtsi128_si32(best);
}

template <int blocks>
inline void add_column(const std::int8_t* value, std::int32_t quad, __m256i (&sum)[2 * blocks]) {
  const __m256i same = _mm256_set1_epi32(quad);
  for (int b = 0; b < 2 * blocks; ++b) {
    sum[b] = _mm256_add_epi32(sum[b], quads_of(same, load(value + b * 32)));
  }
}

// attention_avx512.cpp proves that the quotients are exact.
inline __m128i rounded_mean(__m256i sum, __m256d gain, __m256d half, __m256d inverse) {
  const auto four = [&](__m128i part) {
    const __m256d numerator = _mm256_add_pd(_mm256_mul_pd(_mm256_cvtepi32_pd(part), gain), half);
    return _mm256_cvttpd_epi32(_mm256_floor_pd(_mm256_mul_pd(numerator, inverse)));
  };
  const __m128i words =
      _mm_packs_epi32(four(_mm256_castsi256_si128(sum)), four(_mm256_extracti128_si256(sum, 1)));
  return _mm_max_epi8(_mm_packs_epi16(words, words), _mm_set1_epi8(-127));
}

template <int blocks>
inline void attend_one(const HeadKeys& keys, const HeadScores& scores, const Sight& sight,
                       const std::int8_t* q_bytes, std::int8_t* mean) {
  constexpr std::int64_t depth = blocks * 64;
  Query q;
  __builtin_memcpy(q.quad, q_bytes, static_cast<std::size_t>(keys.quads * kDimQuad));
  const Scaling scaled{_mm256_set1_epi32(1 << (scores.shift - 1)), _mm_cvtsi32_si128(scores.shift)};

  // The start entries, in lanes 0 .. 2.
  const __m256i hidden = _mm256_set1_epi32(kHidden);
  const std::int8_t* start_key = keys.key + keys.rows * keys.quads * keys.columns * kDimQuad;
  __m256i start = scaled(dot(start_key, kCellColumns * kDimQuad, keys.quads, q));
  start = _mm256_blend_epi32(hidden, _mm256_add_epi32(start, load(scores.start)), 7);

  __m256i score_of[kMostGroups * kMostVectors * 2][kCellRows];
  std::int32_t group_of[kMostGroups];
  std::int64_t groups = 0;
  const std::int64_t halves = sight.vectors * 2;
  __m256i top = start;
  const __m256i reads = _mm256_set1_epi32(sight.reads);
  for (std::int64_t g = 0; g < sight.groups; ++g) {
    const std::int64_t row = sight.first_row + g * kCellRows;
    if (keys.first_stage[row / kCellRows] > sight.reads) continue;
    for (std::int64_t n = 0; n < halves; ++n) {
      const std::int64_t column = sight.first_column + n * 8;
      score(keys, scaled, keys.key + (row * keys.quads * keys.columns + column) * kDimQuad,
            keys.stage + row * keys.columns + column,
            scores.window + sight.bias + g * kCellRows * kBiasStride + n * 8, reads, q,
            score_of[groups * halves + n], &top);
    }
    group_of[groups++] = static_cast<std::int32_t>(row / kCellRows);
  }
  const __m256i best = _mm256_set1_epi32(maximum(top));

  __m256i sum[2 * blocks];
  for (__m256i& part : sum) part = _mm256_setzero_si256();
  const __m256i zero = _mm256_setzero_si256();
  // Lanes 0 .. 2 become the first quad of bytes: one column of four rows.
  const __m256i near = weights_of(_mm256_packs_epi32(_mm256_sub_epi32(best, start), zero));
  const std::int32_t first = _mm256_extract_epi32(_mm256_packus_epi16(near, zero), 0);
  __m256i totals = _mm256_sad_epu8(_mm256_setr_epi32(first, 0, 0, 0, 0, 0, 0, 0), zero);
  add_column<blocks>(keys.value + keys.rows / kCellRows * keys.columns * depth, first, sum);
  for (std::int64_t n = 0; n < groups; ++n) {
    for (std::int64_t part = 0; part < halves; ++part) {
      const __m256i* s = score_of[n * halves + part];
      const __m256i weights =
          interleaved_weights(_mm256_sub_epi32(best, s[0]), _mm256_sub_epi32(best, s[1]),
                              _mm256_sub_epi32(best, s[2]), _mm256_sub_epi32(best, s[3]));
      totals = _mm256_add_epi64(totals, _mm256_sad_epu8(weights, zero));
      alignas(32) std::int32_t quad[8];
      _mm256_store_si256(reinterpret_cast<__m256i*>(quad), weights);
      const __m256i unused = _mm256_cmpeq_epi32(weights, zero);
      unsigned used = ~static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(unused))) & 255;
      const std::int8_t* value =
          keys.value + (group_of[n] * keys.columns + sight.first_column + part * 8) * depth;
      for (; used != 0; used &= used - 1) {
        const int column = __builtin_ctz(used);
        add_column<blocks>(value + column * depth, quad[column], sum);
      }
    }
  }
  const __m128i pair =
      _mm_add_epi64(_mm256_castsi256_si128(totals), _mm256_extracti128_si256(totals, 1));
  const auto total =
      static_cast<std::int32_t>(_mm_extract_epi64(pair, 0) + _mm_extract_epi64(pair, 1));
  const __m256d gain = _mm256_set1_pd(static_cast<double>(1 << scores.gain_bits));
  const __m256d half = _mm256_set1_pd(static_cast<double>(total / 2) + 0.5);
  const __m256d inverse = _mm256_set1_pd(1.0 / static_cast<double>(total));
  alignas(16) std::int8_t bytes[kMaxHeadDim + 16];
  for (int b = 0; b < 2 * blocks; ++b) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(bytes + b * 8),
                     rounded_mean(sum[b], gain, half, inverse));
  }
  __builtin_memcpy(mean, bytes, static_cast<std::size_t>(keys.head_dim));
}

template <int blocks>
void attend_all(const HeadKeys& keys, const HeadScores& scores, const Reader* readers,
                std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    attend_one<blocks>(keys, scores, readers[i].sight, readers[i].q, readers[i].mean);
  }
}

void attend(const HeadKeys& keys, const HeadScores& scores, const Reader* readers,
            std::int64_t count) {
  constexpr decltype(&attend_all<1>) kByBlocks[] = {attend_all<1>, attend_all<2>, attend_all<3>,
                                                    attend_all<4>};
  kByBlocks[keys.value_blocks - 1](keys, scores, readers, count);
}

void weigh(const std::int32_t* distances, std::int64_t count, std::uint8_t* weights) {
  for (std::int64_t i = 0; i < count; ++i) {
    const __m256i distance = _mm256_set1_epi32(distances[i]);
    weights[i] = static_cast<std::uint8_t>(
        _mm256_extract_epi16(weights_of(_mm256_packs_epi32(distance, distance)), 0));
  }
}

}  // namespace

const AttentionKernels kAttentionAvx2 = {attend, weigh, false};

}  // namespace percov2
