#include <stdexcept>

#include "support/isa.h"
#include "transformer/linear.h"

namespace percov2 {

const LinearKernels& linear_kernels() {
#if defined(PERCOV2_X86_KERNELS)
  static constexpr const LinearKernels* kTable[kIsaCount] = {&kLinearScalar, &kLinearAvx2,
                                                             &kLinearAvx512, &kLinearScalar};
#elif defined(PERCOV2_NEON_KERNELS)
  static constexpr const LinearKernels* kTable[kIsaCount] = {&kLinearScalar, &kLinearScalar,
                                                             &kLinearScalar, &kLinearNeon};
#else
  static constexpr const LinearKernels* kTable[kIsaCount] = {&kLinearScalar, &kLinearScalar,
                                                             &kLinearScalar, &kLinearScalar};
#endif
  return *kTable[static_cast<int>(active_isa())];
}

const NormKernels& norm_kernels() {
#if defined(PERCOV2_X86_KERNELS)
  static constexpr const NormKernels* kTable[kIsaCount] = {&kNormScalar, &kNormAvx2, &kNormAvx512,
                                                           &kNormScalar};
#elif defined(PERCOV2_NEON_KERNELS)
  static constexpr const NormKernels* kTable[kIsaCount] = {&kNormScalar, &kNormScalar, &kNormScalar,
                                                           &kNormNeon};
#else
  static constexpr const NormKernels* kTable[kIsaCount] = {&kNormScalar, &kNormScalar, &kNormScalar,
                                                           &kNormScalar};
#endif
  return *kTable[static_cast<int>(active_isa())];
}

QuantizedLinear::QuantizedLinear(const LinearParameters& p) {
  constexpr std::int64_t kMostTerms = 1040;  // 1040 * 127^2 < 2^24
  if (p.terms < 1 || p.terms > kMostTerms) {
    throw std::invalid_argument("a linear map of the entropy model has too many terms");
  }
  const std::int64_t blocks = (p.outputs + kOutputBlock - 1) / kOutputBlock;
  const std::int64_t quads = (p.terms + kQuad - 1) / kQuad;
  const std::int64_t padded = blocks * kOutputBlock;
  weight_ = AlignedArray<std::int8_t>(padded * quads * kQuad);
  for (auto* numbers : {&bias_, &lifted_bias_, &multiplier_, &half_, &shift_}) {
    *numbers = AlignedArray<std::int32_t>(padded);
  }
  for (std::int64_t o = 0; o < padded; ++o) multiplier_[o] = shift_[o] = half_[o] = 1;
  for (std::int64_t o = 0; o < p.outputs; ++o) {
    if (p.multiplier[o] < 1 || p.shift[o] < 1 || p.shift[o] > 24) {
      throw std::invalid_argument("a multiplier or shift of the entropy model is out of range");
    }
    std::int32_t sum = 0;
    for (std::int64_t t = 0; t < p.terms; ++t) {
      const std::int64_t block = o / kOutputBlock * quads + t / kQuad;
      const std::int8_t weight = p.weight[o * p.terms + t];
      weight_[(block * kOutputBlock + o % kOutputBlock) * kQuad + t % kQuad] = weight;
      sum += weight;
    }
    bias_[o] = p.bias[o];
    lifted_bias_[o] = p.bias[o] - 128 * sum;
    multiplier_[o] = p.multiplier[o];
    half_[o] = 1 << (p.shift[o] - 1);
    shift_[o] = p.shift[o];
  }
  map_ = {weight_.data(),     bias_.data(), lifted_bias_.data(),
          multiplier_.data(), half_.data(), shift_.data(),
          p.outputs,          blocks,       quads};
}

NormGain::NormGain(const std::int16_t* gain, std::int64_t dim) : dim_(dim), gain_(row_lanes(dim)) {
  for (std::int64_t i = 0; i < dim; ++i) gain_[i] = gain[i];
}

void NormGain::run(const std::int32_t* residual, std::int64_t rows, std::int8_t* out) const {
  norm_kernels().layer_norm(residual, row_lanes(dim_), rows, dim_, gain_.data(), out,
                            row_bytes(dim_));
}

}  // namespace percov2
