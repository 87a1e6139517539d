// Division of a rANS state by a frequency that is known long before the state.
//
// Let 2^s be the smallest power of two that is not below f. Then m = ceil(2^(31 + s) / f) lies in
// [2^31, 2^32), and floor(x / f) = floor(x * m / 2^(31 + s)) for every x < 2^31. For m exceeds the
// true quotient by e / f with 0 <= e < f <= 2^s. That adds x * e / (f * 2^(31 + s)) < 1 / f to x /
// f, too little to reach the next integer. The method: R. Alverson, "Integer division using
// reciprocals" (ARITH 1991). A GPU computes m for 32 symbols at once, and only a multiplication and
// a shift wait for the state.
#pragma once

#include <cstdint>

#include "coder/rans.h"

namespace percov2 {

struct Reciprocal {
  std::uint32_t multiplier;  // m
  std::uint32_t shift;       // s
};

// Requires 1 <= freq <= 2^20.
PERCOV2_HOST_DEVICE Reciprocal reciprocal(std::uint32_t freq) {
#if defined(__CUDA_ARCH__)
  const std::uint32_t shift = 32 - __clz(freq - 1);
#else
  std::uint32_t shift = 0;
  while ((1u << shift) < freq) ++shift;
#endif
  // 2^31 * 2^s divided by freq in three digits. A remainder is below 2^20 and grows by at most
  // 10 bits, so 32 bits suffice.
  const std::uint32_t first = (1u << 31) / freq;
  std::uint32_t rest = (1u << 31) - first * freq;
  const std::uint32_t upper = (shift + 1) / 2, lower = shift / 2;
  const std::uint32_t second = (rest << upper) / freq;
  rest = (rest << upper) - second * freq;
  const std::uint32_t third = (rest << lower) / freq;
  rest = (rest << lower) - third * freq;
  const std::uint32_t floor = (((first << upper) + second) << lower) + third;
  return {floor + static_cast<std::uint32_t>(rest != 0), shift};
}

// floor(x / freq) for x < 2^31. Doubling x keeps the product's shift at 32 or more.
PERCOV2_HOST_DEVICE std::uint32_t quotient(std::uint32_t x, Reciprocal by) {
  return static_cast<std::uint32_t>(std::uint64_t{2 * x} * by.multiplier >> 32) >> by.shift;
}

// encode_symbol without a division. With q = floor(x / freq), q * 2^prob_bits + (x - q * freq) +
// start is x + start + q * (2^prob_bits - freq).
PERCOV2_HOST_DEVICE std::uint32_t encode_symbol(std::uint32_t x, std::uint32_t start,
                                                std::uint32_t freq, Reciprocal by, int prob_bits) {
  return x + start + quotient(x, by) * ((1u << prob_bits) - freq);
}

}  // namespace percov2
