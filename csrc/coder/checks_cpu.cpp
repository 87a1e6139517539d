// Checks of intervals and tables before coding.

#include <cstdint>
#include <stdexcept>
#include <string>

#include "coder/coder.h"

namespace percov2 {

void check_intervals(const std::int32_t* starts, const std::int32_t* freqs, std::int64_t total,
                     int prob_bits) {
  check_prob_bits(prob_bits);
  // One check of all intervals without branches; the faulty one is searched only if there is one.
  const std::uint32_t top = 1u << prob_bits;
  std::uint32_t signs = 0;
  for (std::int64_t i = 0; i < total; ++i) {
    const auto start = static_cast<std::uint32_t>(starts[i]);
    const auto freq = static_cast<std::uint32_t>(freqs[i]);
    // Bit 31 is the sign. The first of the five numbers with a fault is negative; only later ones
    // may have wrapped around.
    signs |= start | freq | (freq - 1) | (top - start) | (top - start - freq);
  }
  if ((signs >> 31) == 0) return;
  std::int64_t i = 0;
  while (valid_interval(starts[i], freqs[i], prob_bits)) ++i;
  throw std::invalid_argument("interval " + std::to_string(i) + " (start " +
                              std::to_string(starts[i]) + ", freq " + std::to_string(freqs[i]) +
                              ") is empty or not inside 0 .. 2^" + std::to_string(prob_bits));
}

void check_tables(const std::int32_t* cdf, std::int64_t first, std::int64_t last,
                  std::int64_t codebook, int prob_bits) {
  check_prob_bits(prob_bits);
  if (codebook < 1) throw std::invalid_argument("a cdf needs at least 2 numbers");
  const std::int32_t top = std::int32_t{1} << prob_bits;
  for (std::int64_t i = first; i < last; ++i) {
    const std::int32_t* line = cdf + i * (codebook + 1);
    std::int32_t falls = 0;  // a number and not a bool, so that the loop vectorises
    for (std::int64_t j = 0; j < codebook; ++j) {
      falls |= static_cast<std::int32_t>(line[j] >= line[j + 1]);
    }
    if (line[0] != 0 || line[codebook] != top || falls != 0) {
      throw std::invalid_argument(
          "cdf row " + std::to_string(i) + " runs from " + std::to_string(line[0]) + " to " +
          std::to_string(line[codebook]) +
          "; it must increase strictly from 0 to 2^prob_bits = " + std::to_string(top));
    }
  }
}

}  // namespace percov2
