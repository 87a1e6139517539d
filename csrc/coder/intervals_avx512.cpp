// Kernels of the quantizer for AVX-512 with VBMI: the weight table lives in twelve registers, as
// three planes of bytes, and 64 weights are looked up at once.
#include <immintrin.h>

#include "coder/intervals_kernels.h"

namespace percov2 {
namespace {

struct Planes {
  alignas(64) std::uint8_t byte[3][256];
};

constexpr Planes split_table() {
  Planes planes{};
  for (int plane = 0; plane < 3; ++plane) {
    for (int i = 0; i < 256; ++i) {
      planes.byte[plane][i] = static_cast<std::uint8_t>(kWeightTable[i] >> (8 * plane));
    }
  }
  return planes;
}

constexpr Planes kPlanes = split_table();

// (a & mask) | b
inline __m512i select(__m512i a, __m512i b, __m512i mask) {
  return _mm512_ternarylogic_epi32(a, b, mask, 0xEC);
}

// One plane of the weights of 64 differences, given their low bytes.
inline __m512i look_up(const std::uint8_t* plane, __m512i low, __mmask64 upper) {
  const __m512i first =
      _mm512_permutex2var_epi8(_mm512_load_si512(plane), low, _mm512_load_si512(plane + 64));
  const __m512i second =
      _mm512_permutex2var_epi8(_mm512_load_si512(plane + 128), low, _mm512_load_si512(plane + 192));
  return _mm512_mask_blend_epi8(upper, first, second);
}

// Weights of two vectors of 32 differences. Words 0-3, 8-11, 16-19 and 24-27 of the first are in
// w[0], its other words in w[1]; w[2] and w[3] hold those of the second. Quarters of four words
// that come in the order 0, 4, 1, 5, 2, 6, 3, 7 give four times sixteen in sequence.
inline void weigh_pair(__m512i first, __m512i second, __m512i w[4]) {
  const __m512i low_bytes = _mm512_set1_epi16(0x00FF);
  const __m512i high_bytes = _mm512_set1_epi16(static_cast<short>(0xFF00));
  // Even bytes belong to the first vector, odd bytes to the second.
  const __m512i low = select(first, _mm512_slli_epi16(second, 8), low_bytes);
  const __mmask64 upper = _mm512_movepi8_mask(low);
  const __m512i p0 = look_up(kPlanes.byte[0], low, upper);
  const __m512i p1 = look_up(kPlanes.byte[1], low, upper);
  const __m512i p2 = look_up(kPlanes.byte[2], low, upper);
  const __m512i words_a = select(p0, _mm512_slli_epi16(p1, 8), low_bytes);
  const __m512i words_b = select(p1, _mm512_srli_epi16(p0, 8), high_bytes);
  const __m512i tops_a = _mm512_and_si512(p2, low_bytes);
  const __m512i tops_b = _mm512_srli_epi16(p2, 8);
  const __m512i octaves_a = _mm512_srli_epi16(first, 8);
  const __m512i octaves_b = _mm512_srli_epi16(second, 8);
  const __m512i zero = _mm512_setzero_si512();
  // Shifts of 32 and more give 0.
  w[0] = _mm512_srlv_epi32(_mm512_unpacklo_epi16(words_a, tops_a),
                           _mm512_unpacklo_epi16(octaves_a, zero));
  w[1] = _mm512_srlv_epi32(_mm512_unpackhi_epi16(words_a, tops_a),
                           _mm512_unpackhi_epi16(octaves_a, zero));
  w[2] = _mm512_srlv_epi32(_mm512_unpacklo_epi16(words_b, tops_b),
                           _mm512_unpacklo_epi16(octaves_b, zero));
  w[3] = _mm512_srlv_epi32(_mm512_unpackhi_epi16(words_b, tops_b),
                           _mm512_unpackhi_epi16(octaves_b, zero));
}

inline __m512i quarters(__m512i words) {
  return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), words);
}

inline __mmask32 first_lanes(std::int64_t count) {
  return count >= 32 ? 0xFFFFFFFFu
                     : _bzhi_u32(0xFFFFFFFFu, count < 0 ? 0 : static_cast<unsigned>(count));
}

// Sums of four vectors, each spread over four lanes: 128-bit part n holds a part of all sums.
inline __m512i sum_parts(const __m512i w[4]) {
  const __m512i ab =
      _mm512_add_epi32(_mm512_unpacklo_epi32(w[0], w[1]), _mm512_unpackhi_epi32(w[0], w[1]));
  const __m512i cd =
      _mm512_add_epi32(_mm512_unpacklo_epi32(w[2], w[3]), _mm512_unpackhi_epi32(w[2], w[3]));
  return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
}

// 128-bit parts 0 + 1 and 2 + 3 of a, then of b.
inline __m512i add_parts(__m512i a, __m512i b) {
  return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xDD));
}

// Weights of 64 logits, and the sums of their four groups, spread as by sum_parts.
inline __m512i weigh_four(const std::int16_t* logits, __m512i top, std::uint32_t* weights) {
  __m512i w[4];
  weigh_pair(quarters(_mm512_sub_epi16(top, _mm512_loadu_si512(logits))),
             quarters(_mm512_sub_epi16(top, _mm512_loadu_si512(logits + 32))), w);
  for (int n = 0; n < 4; ++n) _mm512_storeu_si512(weights + 16 * n, w[n]);
  return sum_parts(w);
}

// The same for up to 64 logits: those from `count` on have weight 0 and are not read.
inline __m512i weigh_some(const std::int16_t* logits, std::int64_t count, __m512i top,
                          std::uint32_t* weights) {
  __m512i w[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(),
                  _mm512_setzero_si512()};
  if (count > 0) {
    const __m512i far = _mm512_set1_epi32(-1);  // 65535 below the top: weight 0
    const __mmask32 a = first_lanes(count);
    const __mmask32 b = first_lanes(count - 32);
    weigh_pair(
        quarters(_mm512_mask_sub_epi16(far, a, top, _mm512_maskz_loadu_epi16(a, logits))),
        quarters(_mm512_mask_sub_epi16(far, b, top, _mm512_maskz_loadu_epi16(b, logits + 32))), w);
  }
  for (int n = 0; n < 4; ++n) _mm512_storeu_si512(weights + 16 * n, w[n]);
  return sum_parts(w);
}

std::int32_t row_max(const std::int16_t* logits, std::int64_t count) {
  __m512i best = _mm512_set1_epi16(-32768);
  std::int64_t i = 0;
  for (; i + 32 <= count; i += 32) best = _mm512_max_epi16(best, _mm512_loadu_si512(logits + i));
  const __mmask32 rest = first_lanes(count - i);
  best = _mm512_mask_max_epi16(best, rest, best, _mm512_maskz_loadu_epi16(rest, logits + i));
  const __m256i half =
      _mm256_max_epi16(_mm512_castsi512_si256(best), _mm512_extracti64x4_epi64(best, 1));
  const __m128i eight =
      _mm_max_epi16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  // The smallest unsigned 32767 - x belongs to the largest signed x.
  const __m128i least = _mm_minpos_epu16(_mm_xor_si128(eight, _mm_set1_epi16(0x7FFF)));
  return static_cast<std::int16_t>(_mm_extract_epi16(least, 0) ^ 0x7FFF);
}

inline std::uint64_t wide_sum(__m512i v) {
  const __m512i low = _mm512_and_si512(v, _mm512_set1_epi64(0xFFFFFFFF));
  return static_cast<std::uint64_t>(
      _mm512_reduce_add_epi64(_mm512_add_epi64(low, _mm512_srli_epi64(v, 32))));
}

Share share(const std::int16_t* logits, std::int64_t count, std::int32_t top, std::int32_t symbol) {
  const __m512i tops = _mm512_set1_epi16(static_cast<short>(top));
  const __m512i far = _mm512_set1_epi32(-1);  // 65535 below the top: weight 0
  // The logit of each weight.
  const __m512i at = _mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
  const __m512i step = _mm512_set1_epi32(4);
  const __m512i at_w[4] = {at, _mm512_add_epi32(at, step),
                           _mm512_add_epi32(at, _mm512_set1_epi32(32)),
                           _mm512_add_epi32(at, _mm512_set1_epi32(36))};
  // 16 sums each, of 512 weights at most: below 2^31.
  __m512i total = _mm512_setzero_si512();
  __m512i prefix = _mm512_setzero_si512();
  for (std::int64_t i = 0; i < count; i += 64) {
    __m512i w[4];
    if (i + 64 <= count) {
      weigh_pair(_mm512_sub_epi16(tops, _mm512_loadu_si512(logits + i)),
                 _mm512_sub_epi16(tops, _mm512_loadu_si512(logits + i + 32)), w);
    } else {
      const __mmask32 a = first_lanes(count - i);
      const __mmask32 b = first_lanes(count - i - 32);
      weigh_pair(_mm512_mask_sub_epi16(far, a, tops, _mm512_maskz_loadu_epi16(a, logits + i)),
                 _mm512_mask_sub_epi16(far, b, tops, _mm512_maskz_loadu_epi16(b, logits + i + 32)),
                 w);
    }
    const __m512i until = _mm512_set1_epi32(static_cast<int>(symbol - i));
    total = _mm512_add_epi32(
        total, _mm512_add_epi32(_mm512_add_epi32(w[0], w[1]), _mm512_add_epi32(w[2], w[3])));
    for (int n = 0; n < 4; ++n) {
      prefix = _mm512_mask_add_epi32(prefix, _mm512_cmplt_epi32_mask(at_w[n], until), prefix, w[n]);
    }
  }
  return {wide_sum(prefix), wide_sum(total), logit_weight(top - logits[symbol])};
}

// Writes the sums of a block's groups, given those of its quarters as by sum_parts.
inline void sum_block(const __m512i quarter[4], std::uint32_t* groups, std::uint32_t* block) {
  const __m512i sums =
      add_parts(add_parts(quarter[0], quarter[1]), add_parts(quarter[2], quarter[3]));
  _mm512_storeu_si512(groups, sums);
  *block = static_cast<std::uint32_t>(_mm512_reduce_add_epi32(sums));
}

void weigh(const std::int16_t* logits, std::int64_t count, std::int32_t top, std::uint32_t* weights,
           std::uint32_t* groups, std::uint32_t* blocks) {
  const __m512i tops = _mm512_set1_epi16(static_cast<short>(top));
  for (std::int64_t i = 0; i < count; i += kRowBlock) {
    __m512i quarter[4];
    for (int q = 0; q < 4; ++q) {
      const std::int64_t at = i + 64 * q;
      quarter[q] = i + kRowBlock <= count ? weigh_four(logits + at, tops, weights + at)
                                          : weigh_some(logits + at, count - at, tops, weights + at);
    }
    sum_block(quarter, groups, blocks++);
    groups += kRowGroup;
  }
}

inline __m512i prefix_sums(__m512i v) {
  const __m512i zero = _mm512_setzero_si512();
  v = _mm512_add_epi32(v, _mm512_alignr_epi32(v, zero, 15));
  v = _mm512_add_epi32(v, _mm512_alignr_epi32(v, zero, 14));
  v = _mm512_add_epi32(v, _mm512_alignr_epi32(v, zero, 12));
  return _mm512_add_epi32(v, _mm512_alignr_epi32(v, zero, 8));
}

// Of sixteen values and their prefix sums p_i: the last i < count for which
// p_i * spread + i * total < bound.
inline Place search_sixteen(__m512i values, std::int64_t count, std::uint64_t spread,
                            std::uint64_t total, std::uint64_t bound) {
  const __m512i prefix = _mm512_sub_epi32(prefix_sums(values), values);
  const __m512i spreads = _mm512_set1_epi64(static_cast<long long>(spread));
  const __m512i bounds = _mm512_set1_epi64(static_cast<long long>(bound));
  const __m512i steps = _mm512_mullo_epi64(_mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7),
                                           _mm512_set1_epi64(static_cast<long long>(total)));
  const __m512i more_steps =
      _mm512_add_epi64(steps, _mm512_set1_epi64(static_cast<long long>(8 * total)));
  const __m512i low = _mm512_cvtepu32_epi64(_mm512_castsi512_si256(prefix));
  const __m512i high = _mm512_cvtepu32_epi64(_mm512_extracti64x4_epi64(prefix, 1));
  const __mmask8 a =
      _mm512_cmplt_epu64_mask(_mm512_add_epi64(_mm512_mul_epu32(low, spreads), steps), bounds);
  const __mmask8 b = _mm512_cmplt_epu64_mask(
      _mm512_add_epi64(_mm512_mul_epu32(high, spreads), more_steps), bounds);
  // The condition holds up to some i and for no larger one.
  std::int64_t index = __builtin_popcount(a) + __builtin_popcount(b) - 1;
  index = index < count ? index : count - 1;
  const __m512i lane = _mm512_set1_epi32(static_cast<int>(index));
  return {static_cast<std::int32_t>(index),
          static_cast<std::uint32_t>(_mm512_cvtsi512_si32(_mm512_permutexvar_epi32(lane, prefix))),
          static_cast<std::uint32_t>(_mm512_cvtsi512_si32(_mm512_permutexvar_epi32(lane, values)))};
}

void search(const std::uint32_t* weights, const std::uint32_t* groups, std::int64_t count,
            std::uint64_t spread, std::uint64_t total, std::uint64_t bound, Place* place) {
  const Place group =
      search_sixteen(_mm512_loadu_si512(groups), (count + kRowGroup - 1) / kRowGroup, spread,
                     kRowGroup * total, bound);
  const std::int64_t first = kRowGroup * group.index;
  const std::int64_t some = count - first < kRowGroup ? count - first : kRowGroup;
  const Place symbol =
      search_sixteen(_mm512_loadu_si512(weights + first), some, spread, total,
                     bound - group.prefix * spread - static_cast<std::uint64_t>(first) * total);
  *place = {static_cast<std::int32_t>(first) + symbol.index, group.prefix + symbol.prefix,
            symbol.weight};
}

// Masked loads of 16-bit lanes are many times slower than plain ones on Zen 4, so whole vectors
// take the plain instruction.

// The logits of the lanes in `some`; -inf in the others, which are not read.
inline __m512 load_sixteen(const float* logits, __mmask16 some) {
  if (some == 0xFFFF) return _mm512_loadu_ps(logits);
  return _mm512_mask_loadu_ps(_mm512_set1_ps(-__builtin_inff()), some, logits);
}

inline __m512 load_sixteen(const std::uint16_t* logits, __mmask16 some) {
  const __m256i least = _mm256_set1_epi16(static_cast<short>(0xFF80));
  const __m256i upper = some == 0xFFFF
                            ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(logits))
                            : _mm256_mask_loadu_epi16(least, some, logits);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(upper), 16));
}

// The largest logit; NaN if one is NaN or +inf, or none is finite.
template <class Float>
float largest(const Float* logits, std::int64_t count) {
  const __m512 lowest = _mm512_set1_ps(-__builtin_inff());
  __m512 best = lowest;
  __m512 second = lowest;
  __mmask16 unordered = 0;
  for (std::int64_t i = 0; i < count; i += 32) {
    const __mmask32 some = first_lanes(count - i);
    const __m512 x = load_sixteen(logits + i, static_cast<__mmask16>(some));
    const __m512 y = load_sixteen(logits + i + 16, static_cast<__mmask16>(some >> 16));
    best = _mm512_max_ps(x, best);
    second = _mm512_max_ps(y, second);
    unordered |= _mm512_cmp_ps_mask(x, y, _CMP_UNORD_Q);  // one of the two is NaN
  }
  const float top = _mm512_reduce_max_ps(_mm512_max_ps(best, second));
  return unordered == 0 && __builtin_fabsf(top) < __builtin_inff() ? top : __builtin_nanf("");
}

// Steps below the largest of sixteen logits. Values outside int32 become -2^31, which saturates to
// -32768: as a difference of 16 bits, 128 octaves.
inline __m512i steps_below(__m512 logits, __m512 top) {
  const __m512 scale = _mm512_set1_ps(kStepsPerNat);
  return _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_sub_ps(top, logits), scale));
}

template <class Float>
bool round_logits(const Float* logits, std::int64_t count, std::int16_t* out) {
  const float top = largest(logits, count);
  if (__builtin_isnan(top)) return false;
  const __m512 tops = _mm512_set1_ps(top);
  const __m512 scale = _mm512_set1_ps(kStepsPerNat);
  for (std::int64_t i = 0; i < count; i += 16) {
    const __mmask16 some = static_cast<__mmask16>(first_lanes(count - i));
    const __m512 x = load_sixteen(logits + i, some);
    // Values outside int32 become -2^31 and correctly saturate to -32768.
    const __m512i steps = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_sub_ps(x, tops), scale));
    _mm512_mask_cvtsepi32_storeu_epi16(out + i, some, steps);
  }
  return true;
}

// Weights of 64 rounded logits, each vector with sixteen in sequence: packing takes turns between
// the quarters of its two vectors, which is the order of `quarters`. So int16 logits are neither
// written nor permuted.
template <class Float>
inline void weigh_floats(const Float* logits, std::int64_t count, __m512 top, __m512i w[4]) {
  if (count <= 0) {
    for (int n = 0; n < 4; ++n) w[n] = _mm512_setzero_si512();
    return;
  }
  __m512i steps[4];
  for (int n = 0; n < 4; ++n) {
    const __mmask32 some = count >= 64 ? 0xFFFF : first_lanes(count - 16 * n) & 0xFFFF;
    steps[n] = steps_below(load_sixteen(logits + 16 * n, static_cast<__mmask16>(some)), top);
  }
  weigh_pair(_mm512_packs_epi32(steps[0], steps[1]), _mm512_packs_epi32(steps[2], steps[3]), w);
}

template <class Float>
bool share_rounded(const Float* logits, std::int64_t count, std::int32_t symbol, Share* share) {
  const float top = largest(logits, count);
  if (__builtin_isnan(top)) return false;
  const __m512 tops = _mm512_set1_ps(top);
  const __m512i at = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  // 16 sums each, of 512 weights at most: below 2^31.
  __m512i total = _mm512_setzero_si512();
  __m512i prefix = _mm512_setzero_si512();
  for (std::int64_t i = 0; i < count; i += 64) {
    __m512i w[4];
    weigh_floats(logits + i, count - i, tops, w);
    total = _mm512_add_epi32(
        total, _mm512_add_epi32(_mm512_add_epi32(w[0], w[1]), _mm512_add_epi32(w[2], w[3])));
    for (int n = 0; n < 4; ++n) {
      const __m512i until = _mm512_set1_epi32(static_cast<int>(symbol - i - 16 * n));
      prefix = _mm512_mask_add_epi32(prefix, _mm512_cmplt_epi32_mask(at, until), prefix, w[n]);
    }
  }
  const __m128i steps = _mm512_castsi512_si128(steps_below(load_sixteen(logits + symbol, 1), tops));
  const __m128i own = _mm_packs_epi32(steps, steps);
  *share = {wide_sum(prefix), wide_sum(total), logit_weight(_mm_extract_epi16(own, 0))};
  return true;
}

template <class Float>
bool weigh_rounded(const Float* logits, std::int64_t count, std::uint32_t* weights,
                   std::uint32_t* groups, std::uint32_t* blocks) {
  const float top = largest(logits, count);
  if (__builtin_isnan(top)) return false;
  const __m512 tops = _mm512_set1_ps(top);
  for (std::int64_t i = 0; i < count; i += kRowBlock) {
    __m512i quarter[4];
    for (int q = 0; q < 4; ++q) {
      const std::int64_t at = i + 64 * q;
      __m512i w[4];
      weigh_floats(logits + at, count - at, tops, w);
      for (int n = 0; n < 4; ++n) _mm512_storeu_si512(weights + at + 16 * n, w[n]);
      quarter[q] = sum_parts(w);
    }
    sum_block(quarter, groups, blocks++);
    groups += kRowGroup;
  }
  return true;
}

}  // namespace

const IntervalKernels kAvx512Intervals = {row_max,       share,        weigh,         search,
                                          round_logits,  round_logits, share_rounded, share_rounded,
                                          weigh_rounded, weigh_rounded};

}  // namespace percov2
