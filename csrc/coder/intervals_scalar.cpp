// Kernels of the quantizer in plain C++.
#include <cmath>

#include "coder/intervals_kernels.h"

namespace percov2 {
namespace {

std::int32_t row_max(const std::int16_t* logits, std::int64_t count) {
  std::int16_t best = logits[0];
  for (std::int64_t i = 1; i < count; ++i) best = logits[i] > best ? logits[i] : best;
  return best;
}

std::uint64_t sum(const std::int16_t* logits, std::int64_t count, std::int32_t top) {
  std::uint64_t total = 0;
  for (std::int64_t i = 0; i < count; ++i) total += logit_weight(top - logits[i]);
  return total;
}

Share share(const std::int16_t* logits, std::int64_t count, std::int32_t top, std::int32_t symbol) {
  const std::uint64_t prefix = sum(logits, symbol, top);
  const std::uint32_t weight = logit_weight(top - logits[symbol]);
  const std::uint64_t suffix = sum(logits + symbol + 1, count - symbol - 1, top);
  return {prefix, prefix + weight + suffix, weight};
}

void weigh(const std::int16_t* logits, std::int64_t count, std::int32_t top, std::uint32_t* weights,
           std::uint32_t* groups, std::uint32_t* blocks) {
  for (std::int64_t first = 0; first < count; first += kRowBlock) {
    std::uint32_t block = 0;
    for (std::int64_t g = first; g < first + kRowBlock; g += kRowGroup) {
      std::uint32_t group = 0;
      for (std::int64_t i = g; i < g + kRowGroup; ++i) {
        weights[i] = i < count ? logit_weight(top - logits[i]) : 0;
        group += weights[i];
      }
      *groups++ = group;
      block += group;
    }
    *blocks++ = block;
  }
}

template <class Float>
bool round_logits(const Float* logits, std::int64_t count, std::int16_t* out) {
  float top = widened(logits[0]);
  bool number = true;
  for (std::int64_t i = 0; i < count; ++i) {
    const float x = widened(logits[i]);
    top = x > top ? x : top;
    number &= x == x;
  }
  if (!number || !std::isfinite(top)) return false;
  // Adding 1.5 * 2^23 leaves no bit for a fraction: the sum is rounded, ties to even.
  constexpr float kRounder = 12582912.0f;
  for (std::int64_t i = 0; i < count; ++i) {
    const float steps = (widened(logits[i]) - top) * kStepsPerNat;
    out[i] =
        static_cast<std::int16_t>((steps > -32768.0f ? steps : -32768.0f) + kRounder - kRounder);
  }
  return true;
}

}  // namespace

const IntervalKernels kScalarIntervals = {row_max,      share,        weigh,
                                          plain_search, round_logits, round_logits};

}  // namespace percov2
