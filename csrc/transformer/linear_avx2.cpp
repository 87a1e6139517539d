// Quantized linear maps with AVX2: four outputs x four terms per instruction.
//
// Bytes widen to int16, vpmaddwd adds pairs of products exactly, and the two halves of each output
// are added at the end. (vpmaddubsw would be exact too, because 2 * 127 * 127 < 2^15, but would
// move the signs of x to the weights for every row.)

#include <immintrin.h>

#include "transformer/linear_kernels.h"

namespace percov2 {
namespace {

constexpr int kRows = 3;                 // with two sums each; GCC 12 keeps more of them in memory
constexpr std::int64_t kLongest = 1056;  // terms of a row of x, in whole registers

// Rows of x as int16.
struct Widened {
  alignas(32) std::int16_t row[kRows][kLongest];
};

inline void widen(const std::int8_t* x, std::int64_t x_stride, int rows, std::int64_t terms,
                  Widened* widened) {
  for (int r = 0; r < rows; ++r) {
    const std::int8_t* from = x + r * x_stride;
    std::int16_t* to = widened->row[r];
    std::int64_t at = 0;
    for (; at + 16 <= terms; at += 16) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + at));
      _mm256_store_si256(reinterpret_cast<__m256i*>(to + at), _mm256_cvtepi8_epi16(bytes));
    }
    for (; at < terms; ++at) to[at] = from[at];
  }
}

inline __m256i load(const std::int32_t* from) {
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(from));
}

// Sixteen outputs before clamping.
struct Outputs {
  __m256i low, high;
};

inline __m256i requantized(const LinearMap& map, std::int64_t at, __m256i first, __m256i second) {
  // Neighbours are halves of one output; quads of outputs have the order 0, 4, 2, 6.
  const __m256i halves = _mm256_hadd_epi32(first, second);
  const __m256i sums = _mm256_permute4x64_epi64(halves, _MM_SHUFFLE(3, 1, 2, 0));
  const __m256i acc = _mm256_add_epi32(sums, load(map.bias + at));
  const __m256i scaled =
      _mm256_add_epi32(_mm256_mullo_epi32(acc, load(map.multiplier + at)), load(map.half + at));
  return _mm256_srav_epi32(scaled, load(map.shift + at));
}

// Eight outputs of some rows: half a block.
template <int rows>
inline void multiply(const LinearMap& map, std::int64_t at, const Widened& x, __m256i* out) {
  __m256i acc[rows][2];
  for (auto& row : acc) row[0] = row[1] = _mm256_setzero_si256();
  const std::int64_t block = at / kOutputBlock;
  const std::int8_t* weight =
      map.weight + (block * map.quads * kOutputBlock + at % kOutputBlock) * kQuad;
  for (std::int64_t q = 0; q < map.quads; ++q) {
    __m256i same[rows];
    for (int r = 0; r < rows; ++r) {
      std::int64_t quad;
      __builtin_memcpy(&quad, x.row[r] + q * kQuad, sizeof quad);
      same[r] = _mm256_set1_epi64x(quad);
    }
    for (int part = 0; part < 2; ++part) {
      const __m128i bytes = _mm_load_si128(
          reinterpret_cast<const __m128i*>(weight + (q * kOutputBlock + part * 4) * kQuad));
      const __m256i w = _mm256_cvtepi8_epi16(bytes);
      for (int r = 0; r < rows; ++r) {
        acc[r][part] = _mm256_add_epi32(acc[r][part], _mm256_madd_epi16(w, same[r]));
      }
    }
  }
  for (int r = 0; r < rows; ++r) out[r] = requantized(map, at, acc[r][0], acc[r][1]);
}

// Sixteen numbers as int16, saturated.
inline __m256i words(const Outputs& outputs) {
  return _mm256_permute4x64_epi64(_mm256_packs_epi32(outputs.low, outputs.high),
                                  _MM_SHUFFLE(3, 1, 2, 0));
}

struct ToBytes {
  std::int8_t* y;
  std::int64_t stride;

  void put(const LinearMap&, std::int64_t row, std::int64_t block, const Outputs& outputs) const {
    const __m256i wide = words(outputs);
    const __m128i bytes =
        _mm_packs_epi16(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y + row * stride + block * kOutputBlock),
                     _mm_max_epi8(bytes, _mm_set1_epi8(-127)));
  }
};

struct ToWords {
  std::int16_t* y;
  std::int64_t stride;

  void put(const LinearMap& map, std::int64_t row, std::int64_t block,
           const Outputs& outputs) const {
    const std::int64_t at = block * kOutputBlock;
    std::int16_t* to = y + row * stride + at;
    if (map.outputs - at >= kOutputBlock) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), words(outputs));
      return;
    }
    alignas(32) std::int16_t some[kOutputBlock];
    _mm256_store_si256(reinterpret_cast<__m256i*>(some), words(outputs));
    for (std::int64_t o = 0; at + o < map.outputs; ++o) to[o] = some[o];
  }
};

struct AddTo {
  std::int32_t* residual;
  std::int64_t stride;

  static __m256i clamp(__m256i value) {
    return _mm256_min_epi32(_mm256_max_epi32(value, _mm256_set1_epi32(-(1 << 20))),
                            _mm256_set1_epi32(1 << 20));
  }
  static void add(std::int32_t* to, __m256i update) {
    auto* at = reinterpret_cast<__m256i*>(to);
    _mm256_storeu_si256(at, clamp(_mm256_add_epi32(_mm256_loadu_si256(at), clamp(update))));
  }
  void put(const LinearMap&, std::int64_t row, std::int64_t block, const Outputs& outputs) const {
    std::int32_t* to = residual + row * stride + block * kOutputBlock;
    add(to, outputs.low);
    add(to + 8, outputs.high);
  }
};

template <int rows, class Sink>
void some_rows(const LinearMap& map, const std::int8_t* x, std::int64_t x_stride, std::int64_t row,
               const Sink& sink) {
  Widened widened;
  widen(x + row * x_stride, x_stride, rows, map.quads * kQuad, &widened);
  for (std::int64_t block = 0; block < map.blocks; ++block) {
    __m256i low[rows], high[rows];
    multiply<rows>(map, block * kOutputBlock, widened, low);
    multiply<rows>(map, block * kOutputBlock + kOutputBlock / 2, widened, high);
    for (int r = 0; r < rows; ++r) sink.put(map, row + r, block, {low[r], high[r]});
  }
}

template <class Sink>
void all_rows(const LinearMap& map, const std::int8_t* x, std::int64_t x_stride, std::int64_t rows,
              const Sink& sink) {
  std::int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) some_rows<kRows>(map, x, x_stride, row, sink);
  if (rows - row == 2) some_rows<2>(map, x, x_stride, row, sink);
  if (rows - row == 1) some_rows<1>(map, x, x_stride, row, sink);
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

const LinearKernels kLinearAvx2 = {to_bytes, to_words, add_to};

}  // namespace percov2
