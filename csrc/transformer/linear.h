// Quantized linear maps and integer LayerNorm of the token transformer, packed for the kernels.
#pragma once

#include <cstdint>

#include "support/aligned_array.h"
#include "transformer/linear_kernels.h"
#include "transformer/norm_kernels.h"

namespace percov2 {

// A linear map with requantization, as stored: weight [outputs, terms], the rest [outputs].
struct LinearParameters {
  const std::int8_t* weight;
  const std::int32_t* bias;
  const std::int8_t* multiplier;
  const std::int8_t* shift;
  std::int64_t outputs;
  std::int64_t terms;
};

// Bytes from one row of `count` activations to the next: whole cache lines.
constexpr std::int64_t row_bytes(std::int64_t count) { return (count + 63) / 64 * 64; }
// Numbers of a row of `count` residuals with their padding.
constexpr std::int64_t row_lanes(std::int64_t count) { return (count + 15) / 16 * 16; }

// The packed form of a linear map. Throws std::invalid_argument for a multiplier or shift out of
// range, or too many terms for exact sums.
class QuantizedLinear {
 public:
  explicit QuantizedLinear(const LinearParameters& parameters);
  const LinearMap& map() const { return map_; }
  std::int64_t outputs() const { return map_.outputs; }

 private:
  AlignedArray<std::int8_t> weight_;
  AlignedArray<std::int32_t> bias_, lifted_bias_, multiplier_, half_, shift_;
  LinearMap map_{};
};

// The gain of a LayerNorm.
class NormGain {
 public:
  NormGain(const std::int16_t* gain, std::int64_t dim);
  // residual [rows] of row_lanes(dim) numbers -> out [rows], row_bytes(dim) apart.
  void run(const std::int32_t* residual, std::int64_t rows, std::int8_t* out) const;

 private:
  std::int64_t dim_;
  AlignedArray<double> gain_;
};

}  // namespace percov2
