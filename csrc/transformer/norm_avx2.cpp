// LayerNorm with AVX2; norm_avx512.cpp proves that its quotients are exact. The table of GELU is in
// memory, because sixteen 16-byte tables in registers would be no faster.

#include <immintrin.h>

#include "transformer/norm_kernels.h"

namespace percov2 {
namespace {

constexpr std::int32_t kResidualLimit = 1 << 20;

inline __m256i load(const std::int32_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}

// Four outputs from four residuals.
inline __m128i four(__m128i y, const double* gain, __m256d half, __m256d inverse) {
  const __m256d product = _mm256_mul_pd(_mm256_cvtepi32_pd(y), _mm256_loadu_pd(gain));
  const __m256d quotient = _mm256_mul_pd(_mm256_add_pd(product, half), inverse);
  return _mm256_cvttpd_epi32(_mm256_floor_pd(quotient));
}

inline std::int64_t sum64(__m256i value) {
  const __m128i pair =
      _mm_add_epi64(_mm256_castsi256_si128(value), _mm256_extracti128_si256(value, 1));
  return _mm_extract_epi64(pair, 0) + _mm_extract_epi64(pair, 1);
}

void layer_norm(const std::int32_t* residual, std::int64_t stride, std::int64_t rows,
                std::int64_t dim, const double* gain, std::int8_t* out, std::int64_t out_stride) {
  const std::int64_t lanes = (dim + kRowLanes - 1) / kRowLanes * kRowLanes;
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int32_t* r = residual + row * stride;
    std::int8_t* to = out + row * out_stride;
    __m256i sums = _mm256_setzero_si256();  // 1024 * 2^20 fits
    for (std::int64_t i = 0; i < lanes; i += 8) sums = _mm256_add_epi32(sums, load(r + i));
    const __m256i wide = _mm256_add_epi64(_mm256_cvtepi32_epi64(_mm256_castsi256_si128(sums)),
                                          _mm256_cvtepi32_epi64(_mm256_extracti128_si256(sums, 1)));
    // A shift of 2^20 per term puts the sum in 0 .. 2^31 + 512, so the division is unsigned.
    const auto shifted = static_cast<std::uint32_t>(sum64(wide) + dim * kResidualLimit + dim / 2);
    const std::int32_t centre =
        static_cast<std::int32_t>(shifted / static_cast<std::uint32_t>(dim)) - kResidualLimit;
    const __m256i c = _mm256_set1_epi32(centre);
    __m256i even = _mm256_setzero_si256();
    __m256i odd = even;
    for (std::int64_t i = 0; i < lanes; i += 8) {
      const __m256i y = _mm256_sub_epi32(load(r + i), c);
      const __m256i other = _mm256_srli_epi64(y, 32);
      even = _mm256_add_epi64(even, _mm256_mul_epi32(y, y));
      odd = _mm256_add_epi64(odd, _mm256_mul_epi32(other, other));
    }
    // The padding adds squares of the mean.
    const std::int64_t energy =
        sum64(_mm256_add_epi64(even, odd)) - (lanes - dim) * std::int64_t{centre} * centre;
    const std::int64_t root = integer_sqrt(energy * 256 / dim) + 1;
    const __m256d half = _mm256_set1_pd(static_cast<double>(root / 2) + 0.5);
    const __m256d inverse = _mm256_set1_pd(1.0 / static_cast<double>(root));
    for (std::int64_t i = 0; i < lanes; i += 16) {
      __m128i part[4];
      for (int n = 0; n < 4; ++n) {
        const __m128i y =
            _mm_sub_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(r + i + n * 4)),
                          _mm256_castsi256_si128(c));
        part[n] = four(y, gain + i + n * 4, half, inverse);
      }
      const __m128i bytes =
          _mm_packs_epi16(_mm_packs_epi32(part[0], part[1]), _mm_packs_epi32(part[2], part[3]));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                       _mm_max_epi8(bytes, _mm_set1_epi8(-127)));
    }
  }
}

void look_up(const std::int8_t* table, std::int8_t* values, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) values[i] = table[static_cast<std::uint8_t>(values[i])];
}

}  // namespace

const NormKernels kNormAvx2 = {layer_norm, look_up};

}  // namespace percov2
