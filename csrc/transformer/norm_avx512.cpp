// LayerNorm and GELU with AVX-512.
//
// The quotient floor((y * A + floor(R / 2)) / R) is floor((y * A + floor(R / 2) + 1/2) * (1 / R))
// in double. The added 1/2 keeps the exact quotient at least 1 / (2 R) > 2^-26 away from integers,
// and |quotient| < 2^12 rounds by less than 2^-39. Numerators below 2^33 are exact.

#include <immintrin.h>

#include "transformer/norm_kernels.h"

namespace percov2 {
namespace {

constexpr std::int32_t kResidualLimit = 1 << 20;

// Eight outputs from eight residuals.
inline __m256i eight(__m256i y, const double* gain, __m512d half, __m512d inverse) {
  const __m512d product = _mm512_mul_pd(_mm512_cvtepi32_pd(y), _mm512_loadu_pd(gain));
  const __m512d quotient = _mm512_mul_pd(_mm512_add_pd(product, half), inverse);
  return _mm512_cvt_roundpd_epi32(quotient, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}

void layer_norm(const std::int32_t* residual, std::int64_t stride, std::int64_t rows,
                std::int64_t dim, const double* gain, std::int8_t* out, std::int64_t out_stride) {
  const std::int64_t lanes = (dim + kRowLanes - 1) / kRowLanes * kRowLanes;
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int32_t* r = residual + row * stride;
    std::int8_t* to = out + row * out_stride;
    __m512i sums = _mm512_setzero_si512();  // 1024 * 2^20 fits
    for (std::int64_t i = 0; i < lanes; i += 16) {
      sums = _mm512_add_epi32(sums, _mm512_loadu_si512(r + i));
    }
    const std::int64_t total = _mm512_reduce_add_epi32(sums);
    // A shift of 2^20 per term puts the sum in 0 .. 2^31 + 512, so the division is unsigned.
    const auto shifted = static_cast<std::uint32_t>(total + dim * kResidualLimit + dim / 2);
    const std::int32_t centre =
        static_cast<std::int32_t>(shifted / static_cast<std::uint32_t>(dim)) - kResidualLimit;
    const __m512i c = _mm512_set1_epi32(centre);
    __m512i even = _mm512_setzero_si512();
    __m512i odd = even;
    for (std::int64_t i = 0; i < lanes; i += 16) {
      const __m512i y = _mm512_sub_epi32(_mm512_loadu_si512(r + i), c);
      const __m512i other = _mm512_srli_epi64(y, 32);
      even = _mm512_add_epi64(even, _mm512_mul_epi32(y, y));
      odd = _mm512_add_epi64(odd, _mm512_mul_epi32(other, other));
    }
    // The padding adds squares of the mean.
    const std::int64_t energy = _mm512_reduce_add_epi64(_mm512_add_epi64(even, odd)) -
                                (lanes - dim) * std::int64_t{centre} * centre;
    const std::int64_t root = integer_sqrt(energy * 256 / dim) + 1;
    const __m512d half = _mm512_set1_pd(static_cast<double>(root / 2) + 0.5);
    const __m512d inverse = _mm512_set1_pd(1.0 / static_cast<double>(root));
    for (std::int64_t i = 0; i < lanes; i += 16) {
      const __m512i y = _mm512_sub_epi32(_mm512_loadu_si512(r + i), c);
      const __m256i low = eight(_mm512_castsi512_si256(y), gain + i, half, inverse);
      const __m256i high = eight(_mm512_extracti64x4_epi64(y, 1), gain + i + 8, half, inverse);
      const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
      const __m128i bytes = _mm_max_epi8(_mm512_cvtsepi32_epi8(both), _mm_set1_epi8(-127));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), bytes);
    }
  }
}

void look_up(const std::int8_t* table, std::int8_t* values, std::int64_t count) {
  const __m512i t0 = _mm512_loadu_si512(table);
  const __m512i t1 = _mm512_loadu_si512(table + 64);
  const __m512i t2 = _mm512_loadu_si512(table + 128);
  const __m512i t3 = _mm512_loadu_si512(table + 192);
  for (std::int64_t i = 0; i < count; i += 64) {
    const __m512i x = _mm512_loadu_si512(values + i);
    // The low seven bits of x index a pair of tables; its top bit chooses the pair.
    const __m512i low = _mm512_permutex2var_epi8(t0, x, t1);
    const __m512i high = _mm512_permutex2var_epi8(t2, x, t3);
    _mm512_storeu_si512(values + i, _mm512_mask_blend_epi8(_mm512_movepi8_mask(x), low, high));
  }
}

}  // namespace

const NormKernels kNormAvx512 = {layer_norm, look_up};

}  // namespace percov2
