// Kernels of quantized linear maps, one table per instruction set.
//
// acc = bias + sum of weight * x, exact in int32 in any order, then
// clamp((acc * multiplier + half) >> shift, low, high): docs/reference/entropy-model.md, section 3.
// The three kernels differ in their limits and outputs.
#pragma once

#include <cstdint>

namespace percov2 {

constexpr std::int64_t kOutputBlock = 16;  // outputs that are packed together
constexpr std::int64_t kQuad = 4;          // terms that are packed together

// A packed map. Arrays begin on 64-byte boundaries. Padding beyond the outputs and terms of the map
// is zero (multiplier and shift: 1), so results beyond its outputs are zero.
struct LinearMap {
  const std::int8_t* weight;        // [blocks][quads][16 outputs][4 terms], -127 .. 127
  const std::int32_t* bias;         // [16 * blocks]
  const std::int32_t* lifted_bias;  // bias - 128 * sum of the weights: for x + 128 in place of x
  const std::int32_t* multiplier;   // 1 .. 127
  const std::int32_t* half;         // 2^(shift - 1)
  const std::int32_t* shift;        // 1 .. 24
  std::int64_t outputs;
  std::int64_t blocks;  // ceil(outputs / 16)
  std::int64_t quads;   // ceil(terms / 4), at most 260
};

// x: [rows], x_stride bytes apart, each of 4 * quads numbers in -127 .. 127; those beyond the
// terms of the map have zero weights.
struct LinearKernels {
  // y: [rows], y_stride apart, each with room for 16 * blocks numbers, all written; limits +-127.
  void (*to_bytes)(const LinearMap& map, const std::int8_t* x, std::int64_t x_stride,
                   std::int64_t rows, std::int8_t* y, std::int64_t y_stride);
  // Limits -2^15 .. 2^15 - 1. Exactly `outputs` numbers of each row are written.
  void (*to_words)(const LinearMap& map, const std::int8_t* x, std::int64_t x_stride,
                   std::int64_t rows, std::int16_t* y, std::int64_t y_stride);
  // Limits +-2^20, added to the residual [rows] of 16 * blocks numbers in +-2^20, where the sum
  // saturates too.
  void (*add_to)(const LinearMap& map, const std::int8_t* x, std::int64_t x_stride,
                 std::int64_t rows, std::int32_t* residual, std::int64_t residual_stride);
};

extern const LinearKernels kLinearScalar;
#if defined(PERCOV2_X86_KERNELS)
extern const LinearKernels kLinearAvx2;
extern const LinearKernels kLinearAvx512;
#elif defined(PERCOV2_NEON_KERNELS)
extern const LinearKernels kLinearNeon;
#endif

// The kernels of the active instruction set.
const LinearKernels& linear_kernels();

}  // namespace percov2
