// Intervals, search and rANS as docs/reference/bitstream.md and docs/reference/entropy-model.md
// state them: one number at a time, sharing nothing with csrc but the table of weights.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "coder/coder.h"

namespace plain {

// [V + 1] numbers from 0 to 2^prob_bits.
inline std::vector<std::int64_t> cdf(const std::int16_t* logits, std::int64_t codebook,
                                     int prob_bits) {
  std::int64_t top = -32768;
  for (std::int64_t i = 0; i < codebook; ++i) top = std::max<std::int64_t>(top, logits[i]);
  std::vector<std::int64_t> prefix(1, 0);
  for (std::int64_t i = 0; i < codebook; ++i) {
    const std::int64_t d = top - logits[i];
    const std::int64_t w = d / 256 >= 22 ? 0 : percov2::weight_table()[d % 256] >> (d / 256);
    prefix.push_back(prefix.back() + w);
  }
  const std::int64_t total = prefix.back();
  const std::int64_t spread = (std::int64_t{1} << prob_bits) - codebook;
  for (std::int64_t i = 0; i <= codebook; ++i) {
    std::int64_t& p = prefix[static_cast<std::size_t>(i)];
    p = p * spread / total + i;
  }
  return prefix;
}

// Natural logarithms as int16 logits to base 2: rint((x - max) * 256 / ln 2) in float32, at least
// -32768; none if one is NaN or +inf or all are -inf.
inline std::vector<std::int16_t> round_logits(const float* logits, std::int64_t count) {
  float top = logits[0];
  for (std::int64_t i = 0; i < count; ++i) {
    if (std::isnan(logits[i])) return {};
    if (logits[i] > top) top = logits[i];
  }
  if (std::isinf(top)) return {};
  std::vector<std::int16_t> rounded;
  for (std::int64_t i = 0; i < count; ++i) {
    const float steps = (logits[i] - top) * percov2::kStepsPerNat;
    rounded.push_back(static_cast<std::int16_t>(steps < -32768 ? -32768 : std::nearbyint(steps)));
  }
  return rounded;
}

// The symbol i with cdf[i] <= target < cdf[i + 1].
inline std::int64_t find(const std::vector<std::int64_t>& cdf, std::int64_t target) {
  std::int64_t i = 0;
  while (cdf[static_cast<std::size_t>(i) + 1] <= target) ++i;
  return i;
}

struct Interval {
  std::int64_t start;
  std::int64_t freq;
  int prob_bits;
};

// The bytes of a stream that begins with `check` and whose decoder meets `symbols` in order.
inline std::vector<std::uint8_t> encode(std::int64_t check, const std::vector<Interval>& symbols) {
  std::int64_t x = check;
  std::vector<std::uint8_t> newest_last;
  for (std::size_t n = symbols.size(); n-- > 0;) {
    const Interval& s = symbols[n];
    while (x >= (s.freq << (31 - s.prob_bits))) {
      newest_last.push_back(static_cast<std::uint8_t>(x % 256));
      x /= 256;
    }
    x = (x / s.freq << s.prob_bits) + x % s.freq + s.start;
  }
  while (x > 0) {
    newest_last.push_back(static_cast<std::uint8_t>(x % 256));
    x /= 256;
  }
  std::reverse(newest_last.begin(), newest_last.end());
  return newest_last;
}

// A stream read forward.
struct Reader {
  std::vector<std::uint8_t> bytes;
  std::int64_t x = 0;
  std::size_t next = 0;

  explicit Reader(std::vector<std::uint8_t> stream) : bytes(std::move(stream)) { refill(); }
  void refill() {
    while (x < (1 << 23) && next < bytes.size()) x = x * 256 + bytes[next++];
  }
  std::int64_t decode(const std::vector<std::int64_t>& cdf, int prob_bits) {
    const std::int64_t size = std::int64_t{1} << prob_bits;
    const std::int64_t symbol = find(cdf, x % size);
    const std::int64_t start = cdf[static_cast<std::size_t>(symbol)];
    const std::int64_t freq = cdf[static_cast<std::size_t>(symbol) + 1] - start;
    x = freq * (x / size) + x % size - start;
    refill();
    return symbol;
  }
};

}  // namespace plain
