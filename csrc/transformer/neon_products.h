// Sums of products of bytes with baseline NEON, exact in int32.
//
// Two products of numbers in -127 .. 127 fit int16 (2 * 127 * 127 < 2^15): smull and smlal multiply
// two quads, sadalp adds neighbours into int32. Six instructions make 32 products. The layout in
// quads assumes little-endian lanes; core.cmake builds these units for no others.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace percov2 {

// The four bytes at `from`, four times.
static inline int8x16_t neon_same_quad(const std::int8_t* from) {
  std::int32_t quad;
  __builtin_memcpy(&quad, from, sizeof quad);
  return vreinterpretq_s8_s32(vdupq_n_s32(quad));
}

// Sums of quads for four outputs, halves of each side by side.
struct NeonHalves {
  int32x4_t low, high;
};

static inline void neon_add(NeonHalves& sum, int8x16_t w, int8x16_t x) {
  sum.low = vpadalq_s16(sum.low, vmull_s8(vget_low_s8(w), vget_low_s8(x)));
  sum.high = vpadalq_s16(sum.high, vmull_high_s8(w, x));
}

static inline void neon_add_two(NeonHalves& sum, int8x16_t w, int8x16_t x, int8x16_t w2,
                                int8x16_t x2) {
  const int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(x));
  sum.low = vpadalq_s16(sum.low, vmlal_s8(low, vget_low_s8(w2), vget_low_s8(x2)));
  sum.high = vpadalq_s16(sum.high, vmlal_high_s8(vmull_high_s8(w, x), w2, x2));
}

static inline int32x4_t neon_total(const NeonHalves& sum) { return vpaddq_s32(sum.low, sum.high); }

// out[r][4 * p ..] = sums over `quads` quads of x[r] with 16 outputs of four bytes each; quads of
// the 16 outputs are `step` bytes apart.
template <int rows>
static inline void neon_sixteen_sums(const std::int8_t* weight, std::int64_t step,
                                     std::int64_t quads, const std::int8_t* const (&x)[rows],
                                     int32x4_t (&out)[rows][4]) {
  NeonHalves sum[rows][4];
  for (auto& row : sum) {
    for (NeonHalves& part : row) part = {vdupq_n_s32(0), vdupq_n_s32(0)};
  }
  std::int64_t q = 0;
  for (; q + 2 <= quads; q += 2) {
    const std::int8_t* w = weight + q * step;
    for (int r = 0; r < rows; ++r) {
      const int8x16_t one = neon_same_quad(x[r] + q * 4);
      const int8x16_t two = neon_same_quad(x[r] + q * 4 + 4);
      for (int p = 0; p < 4; ++p) {
        neon_add_two(sum[r][p], vld1q_s8(w + p * 16), one, vld1q_s8(w + step + p * 16), two);
      }
    }
  }
  if (q < quads) {
    for (int r = 0; r < rows; ++r) {
      const int8x16_t one = neon_same_quad(x[r] + q * 4);
      for (int p = 0; p < 4; ++p) neon_add(sum[r][p], vld1q_s8(weight + q * step + p * 16), one);
    }
  }
  for (int r = 0; r < rows; ++r) {
    for (int p = 0; p < 4; ++p) out[r][p] = neon_total(sum[r][p]);
  }
}

}  // namespace percov2
