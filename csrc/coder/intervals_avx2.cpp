// Kernels of the quantizer for AVX2: weights are gathered eight at a time.
#include <immintrin.h>

#include "coder/intervals_kernels.h"

namespace percov2 {
namespace {

inline __m256i load(const std::int16_t* logits) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(logits));
}

// Weights of eight differences.
inline __m256i weigh_eight(__m256i difference) {
  const __m256i entry = _mm256_and_si256(difference, _mm256_set1_epi32(255));
  const __m256i weight =
      _mm256_i32gather_epi32(reinterpret_cast<const int*>(kWeightTable), entry, 4);
  return _mm256_srlv_epi32(weight, _mm256_srli_epi32(difference, 8));  // 0 from 32 octaves on
}

inline __m256i weigh_low(__m256i differences) {
  return weigh_eight(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(differences)));
}

inline __m256i weigh_high(__m256i differences) {
  return weigh_eight(_mm256_cvtepu16_epi32(_mm256_extracti128_si256(differences, 1)));
}

inline std::uint32_t sum(__m256i v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1));
  return static_cast<std::uint32_t>(_mm_cvtsi128_si32(s));
}

std::int32_t row_max(const std::int16_t* logits, std::int64_t count) {
  std::int16_t best = logits[0];
  std::int64_t i = 0;
  if (count >= 16) {
    __m256i wide = load(logits);
    for (i = 16; i + 16 <= count; i += 16) wide = _mm256_max_epi16(wide, load(logits + i));
    const __m128i eight =
        _mm_max_epi16(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
    // The smallest unsigned 32767 - x belongs to the largest signed x.
    const __m128i least = _mm_minpos_epu16(_mm_xor_si128(eight, _mm_set1_epi16(0x7FFF)));
    best = static_cast<std::int16_t>(_mm_extract_epi16(least, 0) ^ 0x7FFF);
  }
  for (; i < count; ++i) best = logits[i] > best ? logits[i] : best;
  return best;
}

// Eight partial sums of count / 16 * 16 weights, each below 2^32 for 8192 weights.
inline __m256i sum_sixteens(const std::int16_t* logits, std::int64_t count, __m256i tops) {
  __m256i even = _mm256_setzero_si256();
  __m256i odd = _mm256_setzero_si256();
  for (std::int64_t i = 0; i + 16 <= count; i += 16) {
    const __m256i differences = _mm256_sub_epi16(tops, load(logits + i));
    even = _mm256_add_epi32(even, weigh_low(differences));
    odd = _mm256_add_epi32(odd, weigh_high(differences));
  }
  return _mm256_add_epi32(even, odd);
}

inline std::uint64_t wide_sum(__m256i v) {
  const __m256i low = _mm256_and_si256(v, _mm256_set1_epi64x(0xFFFFFFFF));
  const __m256i pairs = _mm256_add_epi64(low, _mm256_srli_epi64(v, 32));
  const __m128i two =
      _mm_add_epi64(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
  return static_cast<std::uint64_t>(_mm_extract_epi64(two, 0) + _mm_extract_epi64(two, 1));
}

Share share(const std::int16_t* logits, std::int64_t count, std::int32_t top, std::int32_t symbol) {
  const __m256i tops = _mm256_set1_epi16(static_cast<short>(top));
  // Whole groups of sixteen before and after the symbol, then the rest between and at the end.
  const std::int64_t before = symbol / 16 * 16;
  const std::int64_t after = before + 16 < count ? before + 16 : count;
  std::uint64_t prefix = wide_sum(sum_sixteens(logits, before, tops));
  for (std::int64_t i = before; i < symbol; ++i) prefix += logit_weight(top - logits[i]);
  const std::uint32_t weight = logit_weight(top - logits[symbol]);
  std::uint64_t total = prefix + weight;
  for (std::int64_t i = symbol + 1; i < after; ++i) total += logit_weight(top - logits[i]);
  total += wide_sum(sum_sixteens(logits + after, count - after, tops));
  for (std::int64_t i = after + (count - after) / 16 * 16; i < count; ++i) {
    total += logit_weight(top - logits[i]);
  }
  return {prefix, total, weight};
}

void weigh(const std::int16_t* logits, std::int64_t count, std::int32_t top, std::uint32_t* weights,
           std::uint32_t* groups, std::uint32_t* blocks) {
  const __m256i tops = _mm256_set1_epi16(static_cast<short>(top));
  for (std::int64_t first = 0; first < count; first += kRowBlock) {
    std::uint32_t block = 0;
    for (std::int64_t i = first; i < first + kRowBlock; i += kRowGroup) {
      __m256i low = _mm256_setzero_si256();
      __m256i high = low;
      if (i + kRowGroup <= count) {
        const __m256i differences = _mm256_sub_epi16(tops, load(logits + i));
        low = weigh_low(differences);
        high = weigh_high(differences);
      } else if (i < count) {
        alignas(32) std::uint32_t some[kRowGroup] = {};
        for (std::int64_t j = i; j < count; ++j) some[j - i] = logit_weight(top - logits[j]);
        low = _mm256_load_si256(reinterpret_cast<const __m256i*>(some));
        high = _mm256_load_si256(reinterpret_cast<const __m256i*>(some + 8));
      }
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights + i), low);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights + i + 8), high);
      *groups = sum(_mm256_add_epi32(low, high));
      block += *groups++;
    }
    *blocks++ = block;
  }
}

inline __m256 load_eight(const float* logits) { return _mm256_loadu_ps(logits); }

inline __m256 load_eight(const std::uint16_t* logits) {
  const __m128i upper = _mm_loadu_si128(reinterpret_cast<const __m128i*>(logits));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(upper), 16));
}

template <class Float>
bool round_logits(const Float* logits, std::int64_t count, std::int16_t* out) {
  const float infinity = __builtin_inff();
  float top = -infinity;
  bool number = true;
  std::int64_t i = 0;
  if (count >= 8) {
    __m256 best = _mm256_set1_ps(-infinity);
    __m256 unordered = _mm256_setzero_ps();
    for (; i + 8 <= count; i += 8) {
      const __m256 x = load_eight(logits + i);
      best = _mm256_max_ps(best, x);
      unordered = _mm256_or_ps(unordered, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    }
    number = _mm256_movemask_ps(unordered) == 0;
    alignas(32) float lane[8];
    _mm256_store_ps(lane, best);
    for (const float x : lane) top = x > top ? x : top;
  }
  for (; i < count; ++i) {
    const float x = widened(logits[i]);
    top = x > top ? x : top;
    number &= x == x;
  }
  if (!number || !(__builtin_fabsf(top) < infinity)) return false;
  const __m256 tops = _mm256_set1_ps(top);
  const __m256 scale = _mm256_set1_ps(kStepsPerNat);
  for (i = 0; i + 8 <= count; i += 8) {
    // Values outside int32 become -2^31 and correctly saturate to -32768.
    const __m256i steps =
        _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_sub_ps(load_eight(logits + i), tops), scale));
    const __m128i packed =
        _mm_packs_epi32(_mm256_castsi256_si128(steps), _mm256_extracti128_si256(steps, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), packed);
  }
  for (; i < count; ++i) {
    const float steps = __builtin_rintf((widened(logits[i]) - top) * kStepsPerNat);
    out[i] = static_cast<std::int16_t>(steps > -32768.0f ? steps : -32768.0f);
  }
  return true;
}

}  // namespace

const IntervalKernels kAvx2Intervals = {row_max,      share,        weigh,
                                        plain_search, round_logits, round_logits};

}  // namespace percov2
