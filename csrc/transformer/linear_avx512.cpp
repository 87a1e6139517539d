// Quantized linear maps with VNNI: sixteen outputs x four terms per instruction.
//
// vpdpbusd multiplies unsigned by signed bytes and adds four products to an int32 without
// saturation. x enters as x + 128 (its top bit flipped); lifted_bias subtracts 128 * sum(weight).
// Both sums are far below 2^31.

#include <immintrin.h>

#include "transformer/linear_kernels.h"

namespace percov2 {
namespace {

constexpr int kRows = 6;  // 6 x 4 accumulators, 4 weights and one x fill the 32 registers
constexpr std::int64_t kLongest = 1088;  // bytes of a row of x, in whole registers

// Rows of x with their top bits flipped.
struct Lifted {
  alignas(64) std::int8_t row[kRows][kLongest];
};

inline void lift(const std::int8_t* x, std::int64_t x_stride, int rows, std::int64_t terms,
                 Lifted* lifted) {
  const __m512i top = _mm512_set1_epi8(-128);
  for (int r = 0; r < rows; ++r) {
    for (std::int64_t at = 0; at < terms; at += 64) {
      const std::int64_t left = terms - at;
      const __mmask64 mask = left >= 64 ? ~__mmask64{0} : (__mmask64{1} << left) - 1;
      const __m512i bytes = _mm512_maskz_loadu_epi8(mask, x + r * x_stride + at);
      _mm512_store_si512(lifted->row[r] + at, _mm512_xor_si512(bytes, top));
    }
  }
}

// `rows` rows times `blocks` blocks of outputs, requantized.
template <int rows, int blocks>
inline void multiply(const LinearMap& map, std::int64_t block, const Lifted& x,
                     __m512i (&acc)[rows][blocks]) {
  for (int b = 0; b < blocks; ++b) {
    const __m512i bias = _mm512_load_si512(map.lifted_bias + (block + b) * kOutputBlock);
    for (int r = 0; r < rows; ++r) acc[r][b] = bias;
  }
  const std::int64_t step = map.quads * kOutputBlock * kQuad;
  const std::int8_t* weight = map.weight + block * step;
  for (std::int64_t q = 0; q < map.quads; ++q) {
    __m512i w[blocks];
    for (int b = 0; b < blocks; ++b) {
      w[b] = _mm512_load_si512(weight + b * step + q * kOutputBlock * kQuad);
    }
    for (int r = 0; r < rows; ++r) {
      std::int32_t quad;
      __builtin_memcpy(&quad, x.row[r] + q * kQuad, sizeof quad);
      const __m512i same = _mm512_set1_epi32(quad);
      for (int b = 0; b < blocks; ++b) acc[r][b] = _mm512_dpbusd_epi32(acc[r][b], same, w[b]);
    }
  }
  for (int b = 0; b < blocks; ++b) {
    const std::int64_t at = (block + b) * kOutputBlock;
    const __m512i multiplier = _mm512_load_si512(map.multiplier + at);
    const __m512i half = _mm512_load_si512(map.half + at);
    const __m512i shift = _mm512_load_si512(map.shift + at);
    for (int r = 0; r < rows; ++r) {
      const __m512i scaled = _mm512_add_epi32(_mm512_mullo_epi32(acc[r][b], multiplier), half);
      acc[r][b] = _mm512_srav_epi32(scaled, shift);
    }
  }
}

struct ToBytes {
  std::int8_t* y;
  std::int64_t stride;

  template <int blocks>
  void put(const LinearMap&, std::int64_t row, std::int64_t block,
           const __m512i (&acc)[blocks]) const {
    std::int8_t* to = y + row * stride + block * kOutputBlock;
    if constexpr (blocks == 4) {
      // Packing saturates to -128 .. 127 and shuffles; the permutation puts quads in order.
      const __m512i low = _mm512_packs_epi32(acc[0], acc[1]);
      const __m512i high = _mm512_packs_epi32(acc[2], acc[3]);
      const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
      const __m512i bytes = _mm512_permutexvar_epi32(order, _mm512_packs_epi16(low, high));
      _mm512_storeu_si512(to, _mm512_max_epi8(bytes, _mm512_set1_epi8(-127)));
    } else {
      for (int b = 0; b < blocks; ++b) {
        const __m128i bytes = _mm512_cvtsepi32_epi8(acc[b]);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + b * kOutputBlock),
                         _mm_max_epi8(bytes, _mm_set1_epi8(-127)));
      }
    }
  }
};

struct ToWords {
  std::int16_t* y;
  std::int64_t stride;

  template <int blocks>
  void put(const LinearMap& map, std::int64_t row, std::int64_t block,
           const __m512i (&acc)[blocks]) const {
    for (int b = 0; b < blocks; ++b) {
      const std::int64_t at = (block + b) * kOutputBlock;
      const std::int64_t left = map.outputs - at;
      const auto mask = static_cast<__mmask16>(left >= kOutputBlock ? 0xFFFF : (1 << left) - 1);
      _mm256_mask_storeu_epi16(y + row * stride + at, mask, _mm512_cvtsepi32_epi16(acc[b]));
    }
  }
};

struct AddTo {
  std::int32_t* residual;
  std::int64_t stride;

  template <int blocks>
  void put(const LinearMap&, std::int64_t row, std::int64_t block,
           const __m512i (&acc)[blocks]) const {
    const __m512i low = _mm512_set1_epi32(-(1 << 20));
    const __m512i high = _mm512_set1_epi32(1 << 20);
    for (int b = 0; b < blocks; ++b) {
      std::int32_t* to = residual + row * stride + (block + b) * kOutputBlock;
      const __m512i update = _mm512_min_epi32(_mm512_max_epi32(acc[b], low), high);
      const __m512i sum = _mm512_add_epi32(_mm512_loadu_si512(to), update);
      _mm512_storeu_si512(to, _mm512_min_epi32(_mm512_max_epi32(sum, low), high));
    }
  }
};

template <int rows, int blocks, class Sink>
inline void tile(const LinearMap& map, std::int64_t row, std::int64_t block, const Lifted& x,
                 const Sink& sink) {
  __m512i acc[rows][blocks];
  multiply<rows, blocks>(map, block, x, acc);
  for (int r = 0; r < rows; ++r) sink.template put<blocks>(map, row + r, block, acc[r]);
}

template <int rows, class Sink>
void some_rows(const LinearMap& map, const std::int8_t* x, std::int64_t x_stride, std::int64_t row,
               const Sink& sink) {
  Lifted lifted;
  lift(x + row * x_stride, x_stride, rows, map.quads * kQuad, &lifted);
  std::int64_t block = 0;
  for (; block + 4 <= map.blocks; block += 4) tile<rows, 4>(map, row, block, lifted, sink);
  for (; block < map.blocks; ++block) tile<rows, 1>(map, row, block, lifted, sink);
}

template <class Sink>
void all_rows(const LinearMap& map, const std::int8_t* x, std::int64_t x_stride, std::int64_t rows,
              const Sink& sink) {
  std::int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) some_rows<kRows>(map, x, x_stride, row, sink);
  switch (rows - row) {
    case 5:
      return some_rows<5>(map, x, x_stride, row, sink);
    case 4:
      return some_rows<4>(map, x, x_stride, row, sink);
    case 3:
      return some_rows<3>(map, x, x_stride, row, sink);
    case 2:
      return some_rows<2>(map, x, x_stride, row, sink);
    case 1:
      return some_rows<1>(map, x, x_stride, row, sink);
    default:
      return;
  }
}

void to_bytes(const LinearMap& map, const std::int8_t* x, std::int64_t x_stride, std::int64_t rows,
              std::int8_t* y, std::int64_t y_stride) {
  all_rows(map, x, x_stride, rows, ToBytes{y, y_stride});
}

void to_words(const LinearMap& map, const std::int8_t* x, std::int64_t x_stride, std::int64_t rows,
              std::int16_t* y, std::int64_t y_stride) {
  all_rows(map, x, x_stride, rows, ToWords{y, y_stride});
}

void add_to(const LinearMap& map, const std::int8_t* x, std::int64_t x_stride, std::int64_t rows,
            std::int32_t* residual, std::int64_t residual_stride) {
  all_rows(map, x, x_stride, rows, AddTo{residual, residual_stride});
}

}  // namespace

const LinearKernels kLinearAvx512 = {to_bytes, to_words, add_to};

}  // namespace percov2
