// LayerNorm and GELU, number by number.

#include "transformer/norm_kernels.h"

namespace percov2 {
namespace {

constexpr std::int64_t kResidualLimit = 1 << 20;

void layer_norm(const std::int32_t* residual, std::int64_t stride, std::int64_t rows,
                std::int64_t dim, const double* gain, std::int8_t* out, std::int64_t out_stride) {
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int32_t* r = residual + row * stride;
    std::int8_t* to = out + row * out_stride;
    std::int64_t total = 0;
    for (std::int64_t i = 0; i < dim; ++i) total += r[i];
    // A shift of 2^20 per term makes the division unsigned.
    const std::int64_t mean = (total + dim * kResidualLimit + dim / 2) / dim - kResidualLimit;
    std::int64_t energy = 0;
    for (std::int64_t i = 0; i < dim; ++i) energy += (r[i] - mean) * (r[i] - mean);
    const std::int64_t root = integer_sqrt(energy * 256 / dim) + 1;
    for (std::int64_t i = 0; i < dim; ++i) {
      const std::int64_t product = (r[i] - mean) * static_cast<std::int64_t>(gain[i]);
      const std::int64_t quotient = (product + 4096 * root + root / 2) / root - 4096;
      to[i] = static_cast<std::int8_t>(quotient < -127 ? -127 : quotient > 127 ? 127 : quotient);
    }
    for (std::int64_t i = dim; i % kRowLanes != 0; ++i) to[i] = 0;
  }
}

void look_up(const std::int8_t* table, std::int8_t* values, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) values[i] = table[static_cast<std::uint8_t>(values[i])];
}

}  // namespace

const NormKernels kNormScalar = {layer_norm, look_up};

}  // namespace percov2
