// Integer logits -> integer intervals.
//
// d = max - logit (1/256 of an octave), w = table[d & 255] >> (d >> 8), P = prefix sums of w,
// S = their total, M = 2^prob_bits, V = codebook size:
//     start_i = floor(P_i * (M - V) / S) + i
// is strictly increasing from 0 (P_0 = 0) to M (P_V = S), so every symbol has freq >= 1.
// Bounds: w < 2^22, V <= 2^13, hence S < 2^35 and P * (M - V) < 2^55: 64 bits always suffice.

#include <algorithm>
#include <cstddef>
#include <stdexcept>
#include <string>
#include <vector>

#include "coder.h"
#include "parallel.h"
#include "weight_table.h"

// Baseline code runs everywhere; where the loader can choose, an AVX2 clone gathers eight weights
// at a time. The integers are the same.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define PERCOV2_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define PERCOV2_CLONES
#endif

namespace percov2 {
namespace {

PERCOV2_CLONES std::int32_t row_max(const std::int16_t* logits, std::int64_t codebook) {
  std::int16_t best = logits[0];
  for (std::int64_t i = 1; i < codebook; ++i) best = std::max(best, logits[i]);
  return best;
}

inline std::uint32_t weight(std::int32_t difference) {
  // Entries are below 2^22, so a shift by 22 or more gives 0; 31 keeps the shift defined.
  return kWeightTable[difference & 255] >> std::min(difference >> 8, 31);
}

// Sum of the weights of logits[0 .. count).
PERCOV2_CLONES std::uint64_t weight_sum(const std::int16_t* logits, std::int64_t count,
                                        std::int32_t top) {
  std::uint64_t total = 0;
  for (std::int64_t block = 0; block < count; block += 1024) {
    const std::int64_t end = std::min(count, block + 1024);
    std::uint32_t sum = 0;  // 1024 * (2^22 - 1) < 2^32
    for (std::int64_t i = block; i < end; ++i) sum += weight(top - logits[i]);
    total += sum;
  }
  return total;
}

PERCOV2_CLONES std::uint64_t fill_weights(const std::int16_t* logits, std::int64_t count,
                                          std::int32_t top, std::uint32_t* out) {
  std::uint64_t total = 0;
  for (std::int64_t block = 0; block < count; block += 1024) {
    const std::int64_t end = std::min(count, block + 1024);
    std::uint32_t sum = 0;
    for (std::int64_t i = block; i < end; ++i) {
      const std::uint32_t w = weight(top - logits[i]);
      out[i] = w;
      sum += w;
    }
    total += sum;
  }
  return total;
}

inline std::uint32_t boundary(std::uint64_t prefix, std::uint64_t spread, std::uint64_t total,
                              std::int64_t index) {
  return static_cast<std::uint32_t>(prefix * spread / total + static_cast<std::uint64_t>(index));
}

}  // namespace

void check_prob_bits(int prob_bits) {
  if (prob_bits < kMinProbBits || prob_bits > kMaxProbBits) {
    throw std::invalid_argument("prob_bits is " + std::to_string(prob_bits) +
                                "; it must be 8 to 20");
  }
}

void check_codebook(std::int64_t codebook, int prob_bits) {
  check_prob_bits(prob_bits);
  if (codebook < kMinCodebook || codebook > kMaxCodebook) {
    throw std::invalid_argument("the codebook has " + std::to_string(codebook) +
                                " entries; it must have 2 to 8192");
  }
  if ((std::int64_t{1} << prob_bits) < 2 * codebook) {
    throw std::invalid_argument("prob_bits is " + std::to_string(prob_bits) +
                                ", too few for a codebook of " + std::to_string(codebook) +
                                " entries: 2^prob_bits must be at least twice its size");
  }
}

const std::uint32_t* weight_table() { return kWeightTable; }

void intervals(const std::int16_t* logits, const std::int32_t* symbols, std::int64_t rows,
               std::int64_t codebook, int prob_bits, int threads, std::int32_t* starts,
               std::int32_t* freqs) {
  check_codebook(codebook, prob_bits);
  for (std::int64_t row = 0; row < rows; ++row) {
    if (symbols[row] < 0 || symbols[row] >= codebook) {
      throw std::invalid_argument("symbol " + std::to_string(symbols[row]) + " at row " +
                                  std::to_string(row) + " is not in 0 .. " +
                                  std::to_string(codebook - 1));
    }
  }
  const std::uint64_t spread =
      (std::uint64_t{1} << prob_bits) - static_cast<std::uint64_t>(codebook);
  parallel_ranges(rows, threads, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t row = first; row < last; ++row) {
      const std::int16_t* line = logits + row * codebook;
      const std::int32_t symbol = symbols[row];
      const std::int32_t top = row_max(line, codebook);
      const std::uint64_t prefix = weight_sum(line, symbol, top);
      const std::uint64_t next = prefix + weight(top - line[symbol]);
      const std::uint64_t total = next + weight_sum(line + symbol + 1, codebook - symbol - 1, top);
      const std::uint32_t start = boundary(prefix, spread, total, symbol);
      starts[row] = static_cast<std::int32_t>(start);
      freqs[row] = static_cast<std::int32_t>(boundary(next, spread, total, symbol + 1) - start);
    }
  });
}

void cdf_table(const std::int16_t* logits, std::int64_t rows, std::int64_t codebook, int prob_bits,
               int threads, std::int32_t* cdf) {
  check_codebook(codebook, prob_bits);
  const std::uint64_t spread =
      (std::uint64_t{1} << prob_bits) - static_cast<std::uint64_t>(codebook);
  parallel_ranges(rows, threads, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t row = first; row < last; ++row) {
      const std::int16_t* line = logits + row * codebook;
      std::int32_t* out = cdf + row * (codebook + 1);
      const std::int32_t top = row_max(line, codebook);
      const std::uint64_t total = weight_sum(line, codebook, top);
      std::uint64_t prefix = 0;
      for (std::int64_t i = 0; i <= codebook; ++i) {
        out[i] = static_cast<std::int32_t>(boundary(prefix, spread, total, i));
        if (i < codebook) prefix += weight(top - line[i]);
      }
    }
  });
}

Found search(const std::int16_t* logits, std::int64_t codebook, int prob_bits, std::uint32_t target,
             std::uint32_t* scratch) {
  const std::uint64_t spread =
      (std::uint64_t{1} << prob_bits) - static_cast<std::uint64_t>(codebook);
  const std::uint64_t total = fill_weights(logits, codebook, row_max(logits, codebook), scratch);
  // start_i <= target  <=>  P_i * (M - V) < (target - i + 1) * S; false for every i > target. The
  // condition is monotone in i and true for i = 0: walk to the last i that meets it. The right-hand
  // side is kept by subtraction, so the walk neither divides nor multiplies: both sides < 2^56.
  std::uint64_t prefix = 0;
  std::int64_t right = (static_cast<std::int64_t>(target) + 1) * static_cast<std::int64_t>(total);
  std::int64_t symbol = 0;
  while (symbol + 1 < codebook) {
    const std::uint64_t next = prefix + scratch[symbol];
    right -= static_cast<std::int64_t>(total);
    if (static_cast<std::int64_t>(next * spread) >= right) break;
    prefix = next;
    ++symbol;
  }
  const std::uint32_t start = boundary(prefix, spread, total, symbol);
  const std::uint32_t end = boundary(prefix + scratch[symbol], spread, total, symbol + 1);
  return {static_cast<std::int32_t>(symbol), start, end - start};
}

}  // namespace percov2
