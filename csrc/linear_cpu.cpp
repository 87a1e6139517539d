// Linear maps and LayerNorm of the integer token transformer.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <stdexcept>

#include "clones.h"
#include "transformer.h"

namespace percov2 {
namespace {

constexpr std::int64_t kOutputs = 32;  // outputs computed together
constexpr std::int64_t kRows = 4;      // rows computed together
constexpr std::int32_t kResidualLimit = 1 << 20;

// Accumulators of up to kRows rows and one tile of outputs, requantized. y has room for a tile.
PERCOV2_VECTOR_CLONES void linear_tile(const float* x, std::int64_t stride, std::int64_t rows,
                                       std::int64_t terms, const std::int8_t* weight,
                                       const float* bias, const std::int32_t* multiplier,
                                       const std::int32_t* shift, std::int32_t low,
                                       std::int32_t high, std::int32_t* y) {
  float acc[kRows][kOutputs];
  for (std::int64_t r = 0; r < kRows; ++r) {
    for (std::int64_t o = 0; o < kOutputs; ++o) acc[r][o] = bias[o];
  }
  // Missing rows repeat the last one, so that the loops below have fixed lengths.
  const float* line[kRows];
  for (std::int64_t r = 0; r < kRows; ++r) line[r] = x + std::min(r, rows - 1) * stride;
  for (std::int64_t t = 0; t < terms; ++t) {
    const std::int8_t* w = weight + t * kOutputs;
    float wide[kOutputs];
    for (std::int64_t o = 0; o < kOutputs; ++o) wide[o] = static_cast<float>(w[o]);
    for (std::int64_t r = 0; r < kRows; ++r) {
      const float value = line[r][t];
      for (std::int64_t o = 0; o < kOutputs; ++o) acc[r][o] += value * wide[o];
    }
  }
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t o = 0; o < kOutputs; ++o) {
      // |acc| < 2^24, multiplier <= 127 and shift <= 24: within int32.
      const std::int32_t scaled = static_cast<std::int32_t>(acc[r][o]) * multiplier[o];
      const std::int32_t rounded = (scaled + (1 << (shift[o] - 1))) >> shift[o];
      y[r * kOutputs + o] = std::min(std::max(rounded, low), high);
    }
  }
}

PERCOV2_VECTOR_CLONES void layer_norm_row(const std::int32_t* residual, const std::int32_t* gain,
                                          std::int64_t dim, float* out) {
  std::int64_t total = 0;
  for (std::int64_t i = 0; i < dim; ++i) total += residual[i];
  // Shifted by 2^20 per term: no negative number is divided.
  const std::int64_t shifted = total + dim * kResidualLimit + dim / 2;
  const std::int32_t mean = static_cast<std::int32_t>(shifted / dim - kResidualLimit);
  std::int64_t energy = 0;
  for (std::int64_t i = 0; i < dim; ++i) {
    const std::int64_t y = residual[i] - mean;
    energy += y * y;
  }
  const std::int64_t square = energy * 256 / dim;  // < 2^59 before, < 2^49 after the division
  std::int64_t root = static_cast<std::int64_t>(std::sqrt(static_cast<double>(square)));
  if (root * root > square) --root;
  if ((root + 1) * (root + 1) <= square) ++root;
  const double divisor = static_cast<double>(root + 1);
  const double offset = divisor * 4096 + static_cast<double>((root + 1) / 2);
  for (std::int64_t i = 0; i < dim; ++i) {
    // An integer below 2^38 over one below 2^25: the floor of the double quotient is exact, and
    // truncation is floor because nothing is negative.
    const double numerator = static_cast<double>(residual[i] - mean) * gain[i] + offset;
    const std::int32_t quotient = static_cast<std::int32_t>(numerator / divisor) - 4096;
    out[i] = static_cast<float>(std::min(std::max(quotient, -127), 127));
  }
}

}  // namespace

void layer_norm(const std::int32_t* residual, const std::int32_t* gain, std::int64_t rows,
                std::int64_t dim, float* out) {
  for (std::int64_t row = 0; row < rows; ++row) {
    layer_norm_row(residual + row * dim, gain, dim, out + row * dim);
  }
}

QuantizedLinear::QuantizedLinear(const LinearParameters& p, std::int32_t low, std::int32_t high)
    : outputs_(p.outputs), terms_(p.terms), low_(low), high_(high) {
  const std::int64_t tiles = (p.outputs + kOutputs - 1) / kOutputs;
  const auto padded = static_cast<std::size_t>(tiles * kOutputs);
  weight_.assign(padded * static_cast<std::size_t>(p.terms), 0);
  bias_.assign(padded, 0);
  multiplier_.assign(padded, 1);
  shift_.assign(padded, 1);
  for (std::int64_t o = 0; o < p.outputs; ++o) {
    const auto at = static_cast<std::size_t>(o);
    bias_[at] = static_cast<float>(p.bias[o]);
    multiplier_[at] = p.multiplier[o];
    shift_[at] = p.shift[o];
    if (p.multiplier[o] < 1 || p.shift[o] < 1 || p.shift[o] > 24) {
      throw std::invalid_argument("a multiplier or shift of the entropy model is out of range");
    }
    for (std::int64_t t = 0; t < p.terms; ++t) {
      const std::int64_t tile = o / kOutputs;
      weight_[static_cast<std::size_t>((tile * p.terms + t) * kOutputs + o % kOutputs)] =
          p.weight[o * p.terms + t];
    }
  }
}

void QuantizedLinear::run(const float* x, std::int64_t rows, std::int32_t* y) const {
  std::int32_t tile[kRows * kOutputs];
  for (std::int64_t row = 0; row < rows; row += kRows) {
    const std::int64_t count = std::min(kRows, rows - row);
    for (std::int64_t o = 0; o < outputs_; o += kOutputs) {
      linear_tile(x + row * terms_, terms_, count, terms_, weight_.data() + o * terms_,
                  bias_.data() + o, multiplier_.data() + o, shift_.data() + o, low_, high_, tile);
      const std::int64_t width = std::min(kOutputs, outputs_ - o);
      for (std::int64_t r = 0; r < count; ++r) {
        std::copy_n(tile + r * kOutputs, width, y + (row + r) * outputs_ + o);
      }
    }
  }
}

}  // namespace percov2
