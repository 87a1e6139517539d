// LayerNorm and GELU with NEON; norm_avx512.cpp proves that the quotients are exact.

#include <arm_neon.h>

#include "transformer/norm_kernels.h"

namespace percov2 {
namespace {

constexpr std::int32_t kResidualLimit = 1 << 20;

// Two outputs before clamping.
inline int32x2_t two(int32x2_t y, const double* gain, float64x2_t half, float64x2_t inverse) {
  const float64x2_t product = vmulq_f64(vcvtq_f64_s64(vmovl_s32(y)), vld1q_f64(gain));
  return vmovn_s64(vcvtmq_s64_f64(vmulq_f64(vaddq_f64(product, half), inverse)));
}

inline int16x4_t four(int32x4_t y, const double* gain, float64x2_t half, float64x2_t inverse) {
  return vqmovn_s32(vcombine_s32(two(vget_low_s32(y), gain, half, inverse),
                                 two(vget_high_s32(y), gain + 2, half, inverse)));
}

void layer_norm(const std::int32_t* residual, std::int64_t stride, std::int64_t rows,
                std::int64_t dim, const double* gain, std::int8_t* out, std::int64_t out_stride) {
  const std::int64_t lanes = (dim + kRowLanes - 1) / kRowLanes * kRowLanes;
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int32_t* r = residual + row * stride;
    std::int8_t* to = out + row * out_stride;
    int64x2_t sums = vdupq_n_s64(0);
    for (std::int64_t i = 0; i < lanes; i += 4) sums = vpadalq_s32(sums, vld1q_s32(r + i));
    // A shift of 2^20 per term puts the sum in 0 .. 2^31 + 512, so the division is unsigned.
    const auto shifted =
        static_cast<std::uint32_t>(vaddvq_s64(sums) + dim * kResidualLimit + dim / 2);
    const std::int32_t centre =
        static_cast<std::int32_t>(shifted / static_cast<std::uint32_t>(dim)) - kResidualLimit;
    const int32x4_t c = vdupq_n_s32(centre);
    int64x2_t squares = vdupq_n_s64(0);
    for (std::int64_t i = 0; i < lanes; i += 4) {
      const int32x4_t y = vsubq_s32(vld1q_s32(r + i), c);
      squares = vmlal_s32(squares, vget_low_s32(y), vget_low_s32(y));
      squares = vmlal_high_s32(squares, y, y);
    }
    // The padding adds squares of the mean.
    const std::int64_t energy = vaddvq_s64(squares) - (lanes - dim) * std::int64_t{centre} * centre;
    const std::int64_t root = integer_sqrt(energy * 256 / dim) + 1;
    const float64x2_t half = vdupq_n_f64(static_cast<double>(root / 2) + 0.5);
    const float64x2_t inverse = vdupq_n_f64(1.0 / static_cast<double>(root));
    for (std::int64_t i = 0; i < lanes; i += 8) {
      const int16x4_t low = four(vsubq_s32(vld1q_s32(r + i), c), gain + i, half, inverse);
      const int16x4_t high = four(vsubq_s32(vld1q_s32(r + i + 4), c), gain + i + 4, half, inverse);
      const int8x8_t bytes = vqmovn_s16(vcombine_s16(low, high));
      vst1_s8(to + i, vmax_s8(bytes, vdup_n_s8(-127)));
    }
  }
}

// Sixteen registers hold the table; an index outside a quarter looks up nothing there.
void look_up(const std::int8_t* table, std::int8_t* values, std::int64_t count) {
  int8x16x4_t quarter[4];
  for (int n = 0; n < 4; ++n) {
    for (int p = 0; p < 4; ++p) quarter[n].val[p] = vld1q_s8(table + n * 64 + p * 16);
  }
  for (std::int64_t i = 0; i < count; i += 16) {
    const uint8x16_t index = vreinterpretq_u8_s8(vld1q_s8(values + i));
    int8x16_t found = vqtbl4q_s8(quarter[0], index);
    found = vqtbx4q_s8(found, quarter[1], vsubq_u8(index, vdupq_n_u8(64)));
    found = vqtbx4q_s8(found, quarter[2], vsubq_u8(index, vdupq_n_u8(128)));
    found = vqtbx4q_s8(found, quarter[3], vsubq_u8(index, vdupq_n_u8(192)));
    vst1q_s8(values + i, found);
  }
}

}  // namespace

const NormKernels kNormNeon = {layer_norm, look_up};

}  // namespace percov2
