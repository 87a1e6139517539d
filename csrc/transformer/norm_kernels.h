// Kernels of LayerNorm and GELU, row by row.
#pragma once

#include <cstdint>

namespace percov2 {

constexpr std::int64_t kRowLanes = 16;  // residuals and gains are padded to multiples of this

struct NormKernels {
  // Integer LayerNorm (docs/reference/entropy-model.md, section 3) of `rows` rows of a residual in
  // +-2^20, `stride` apart. dim <= 1024. Rows, gain (integers in -2047 .. 2047) and out (int8 in
  // -127 .. 127, `out_stride` apart) hold zeros from dim up to the next multiple of 16.
  void (*layer_norm)(const std::int32_t* residual, std::int64_t stride, std::int64_t rows,
                     std::int64_t dim, const double* gain, std::int8_t* out,
                     std::int64_t out_stride);
  // values[i] = table[the byte of values[i]], in place. table: [256]; values in -127 .. 127 are
  // bytes 0 .. 127 and 129 .. 255. values has room for a multiple of 64 numbers, all of which may
  // change.
  void (*look_up)(const std::int8_t* table, std::int8_t* values, std::int64_t count);
};

// The largest integer whose square is at most `square` (< 2^51).
static inline std::int64_t integer_sqrt(std::int64_t square) {
  auto root = static_cast<std::int64_t>(__builtin_sqrt(static_cast<double>(square)));
  root -= root * root > square;
  root += (root + 1) * (root + 1) <= square;
  return root;
}

extern const NormKernels kNormScalar;
#if defined(PERCOV2_X86_KERNELS)
extern const NormKernels kNormAvx2;
extern const NormKernels kNormAvx512;
#elif defined(PERCOV2_NEON_KERNELS)
extern const NormKernels kNormNeon;
#endif

// The kernels of the active instruction set.
const NormKernels& norm_kernels();

}  // namespace percov2
