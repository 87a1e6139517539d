// Quantized linear maps with baseline NEON: two rows x sixteen outputs at once.

#include <arm_neon.h>

#include "transformer/linear_kernels.h"
#include "transformer/neon_products.h"

namespace percov2 {
namespace {

// Sixteen outputs before clamping.
struct Outputs {
  int32x4_t part[4];
};

inline Outputs requantized(const LinearMap& map, std::int64_t block, const int32x4_t (&sums)[4]) {
  Outputs outputs;
  for (int p = 0; p < 4; ++p) {
    const std::int64_t at = block * kOutputBlock + p * 4;
    const int32x4_t acc = vaddq_s32(sums[p], vld1q_s32(map.bias + at));
    const int32x4_t scaled =
        vmlaq_s32(vld1q_s32(map.half + at), acc, vld1q_s32(map.multiplier + at));
    outputs.part[p] = vshlq_s32(scaled, vnegq_s32(vld1q_s32(map.shift + at)));
  }
  return outputs;
}

inline int16x8_t words(const Outputs& outputs, int half) {
  return vcombine_s16(vqmovn_s32(outputs.part[half * 2]), vqmovn_s32(outputs.part[half * 2 + 1]));
}

struct ToBytes {
  std::int8_t* y;
  std::int64_t stride;

  void put(const LinearMap&, std::int64_t row, std::int64_t block, const Outputs& outputs) const {
    const int8x16_t bytes =
        vcombine_s8(vqmovn_s16(words(outputs, 0)), vqmovn_s16(words(outputs, 1)));
    vst1q_s8(y + row * stride + block * kOutputBlock, vmaxq_s8(bytes, vdupq_n_s8(-127)));
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
      vst1q_s16(to, words(outputs, 0));
      vst1q_s16(to + 8, words(outputs, 1));
      return;
    }
    std::int16_t some[kOutputBlock];
    vst1q_s16(some, words(outputs, 0));
    vst1q_s16(some + 8, words(outputs, 1));
    for (std::int64_t o = 0; at + o < map.outputs; ++o) to[o] = some[o];
  }
};

struct AddTo {
  std::int32_t* residual;
  std::int64_t stride;

  static int32x4_t clamp(int32x4_t value) {
    return vminq_s32(vmaxq_s32(value, vdupq_n_s32(-(1 << 20))), vdupq_n_s32(1 << 20));
  }
  void put(const LinearMap&, std::int64_t row, std::int64_t block, const Outputs& outputs) const {
    std::int32_t* to = residual + row * stride + block * kOutputBlock;
    for (int p = 0; p < 4; ++p) {
      const int32x4_t sum = vaddq_s32(vld1q_s32(to + p * 4), clamp(outputs.part[p]));
      vst1q_s32(to + p * 4, clamp(sum));
    }
  }
};

template <int rows, class Sink>
inline void some_rows(const LinearMap& map, const std::int8_t* const (&x)[rows], std::int64_t row,
                      const Sink& sink) {
  constexpr std::int64_t kStep = kOutputBlock * kQuad;
  for (std::int64_t block = 0; block < map.blocks; ++block) {
    int32x4_t sums[rows][4];
    neon_sixteen_sums<rows>(map.weight + block * map.quads * kStep, kStep, map.quads, x, sums);
    for (int r = 0; r < rows; ++r) {
      sink.put(map, row + r, block, requantized(map, block, sums[r]));
    }
  }
}

template <class Sink>
void all_rows(const LinearMap& map, const std::int8_t* x, std::int64_t x_stride, std::int64_t rows,
              const Sink& sink) {
  std::int64_t row = 0;
  for (; row + 2 <= rows; row += 2) {
    const std::int8_t* const two[2] = {x + row * x_stride, x + (row + 1) * x_stride};
    some_rows<2>(map, two, row, sink);
  }
  if (row < rows) {
    const std::int8_t* const one[1] = {x + row * x_stride};
    some_rows<1>(map, one, row, sink);
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

const LinearKernels kLinearNeon = {to_bytes, to_words, add_to};

}  // namespace percov2
