// Logits to intervals: the quantizer of probability rows.
//
// d = max - logit (1/256 of an octave), w = table[d & 255] >> (d >> 8), P = prefix sums of w,
// S = their total, M = 2^prob_bits, V = codebook size:
//     start_i = floor(P_i * (M - V) / S) + i
// is strictly increasing from 0 (P_0 = 0) to M (P_V = S), so every symbol has freq >= 1.
// Bounds: w < 2^22 and V <= 2^13, so S < 2^35 and P * (M - V) < 2^55: 64 bits suffice.
#pragma once

#include <cstdint>
#include <vector>

#include "coder/intervals_kernels.h"

namespace percov2 {

constexpr int kMinCodebook = 2;
constexpr int kMaxCodebook = 8192;

// Throws std::invalid_argument unless 8 <= prob_bits <= 20.
void check_prob_bits(int prob_bits);
// Throws std::invalid_argument unless 2 <= codebook <= 8192 and 2^prob_bits >= 2 * codebook.
void check_codebook(std::int64_t codebook, int prob_bits);

// The 256 entries of the weight table.
const std::uint32_t* weight_table();

enum class LogitType {
  kInt16,     // base 2, in 1/256 of an octave
  kFloat32,   // natural logarithms, rounded to int16 by IntervalKernels::round_floats
  kBfloat16,  // the same, as the upper halves of float32
};

// Borrowed logits: rows of `codebook` numbers, one row after the other.
struct Logits {
  const void* data;
  LogitType type;
  std::int64_t codebook;
};

inline Logits int16_logits(const std::int16_t* data, std::int64_t codebook) {
  return {data, LogitType::kInt16, codebook};
}

struct Interval {
  std::uint32_t start;
  std::uint32_t freq;
};

struct Found {
  std::int32_t symbol;
  std::uint32_t start;
  std::uint32_t freq;
};

// The symbol of a table [codebook + 1] whose interval holds `target`: the last bound that is not
// above it. Bisection without branches has no mispredictions, so searches of several streams
// overlap.
inline Found find_in_table(const std::int32_t* table, std::int64_t codebook, std::uint32_t target) {
  const std::int32_t* bound = table;
  for (std::int64_t left = codebook; left > 1;) {
    const std::int64_t half = left / 2;
    bound += half & -static_cast<std::int64_t>(static_cast<std::uint32_t>(bound[half]) <= target);
    left -= half;
  }
  return {static_cast<std::int32_t>(bound - table), static_cast<std::uint32_t>(bound[0]),
          static_cast<std::uint32_t>(bound[1] - bound[0])};
}

// The same for `some` tables at once. A table of a large codebook lies in few caches, and the
// processor waits for all tables at the same time.
inline void find_in_tables(const std::int32_t* const* tables, std::int64_t some,
                           std::int64_t codebook, const std::uint32_t* targets, Found* found) {
  constexpr std::int64_t kMost = 8;
  const std::int32_t* bounds[kMost];
  for (std::int64_t r = 0; r < some; ++r) bounds[r] = tables[r];
  for (std::int64_t left = codebook; left > 1;) {
    const std::int64_t half = left / 2;
    for (std::int64_t r = 0; r < some; ++r) {
      const bool below = static_cast<std::uint32_t>(bounds[r][half]) <= targets[r];
      bounds[r] += half & -static_cast<std::int64_t>(below);
    }
    left -= half;
  }
  for (std::int64_t r = 0; r < some; ++r) {
    const auto start = static_cast<std::uint32_t>(bounds[r][0]);
    found[r] = {static_cast<std::int32_t>(bounds[r] - tables[r]), start,
                static_cast<std::uint32_t>(bounds[r][1]) - start};
  }
}

// Turns rows into intervals, with the kernels of the active instruction set. Not thread-safe.
// Throws std::invalid_argument as check_codebook does.
class RowQuantizer {
 public:
  RowQuantizer(const Logits& logits, int prob_bits);

  // The interval of `symbol`, 0 .. codebook - 1, in a row. Throws std::invalid_argument for float
  // logits with NaN, +inf or nothing finite.
  Interval interval(std::int64_t row, std::int32_t symbol);
  // All bounds of a row, codebook + 1. Throws like interval.
  void bounds(std::int64_t row, std::int32_t* cdf);
  // Reads a row for `find`. Throws like interval.
  void prepare(std::int64_t row);
  // The symbol of the prepared row whose interval holds `target` < 2^prob_bits.
  void find(std::uint32_t target, Found* found) const;

 private:
  template <class Number>
  const Number* at(std::int64_t row) const {
    return static_cast<const Number*>(logits_.data) + row * logits_.codebook;
  }
  static void check_finite(bool finite, std::int64_t row);
  void open(std::int64_t row);
  Interval between(const Share& share, double inverse, std::int64_t symbol) const;

  const IntervalKernels& kernels_;
  Logits logits_;
  std::int64_t blocks_;
  std::uint64_t spread_;                // 2^prob_bits - codebook
  bool in_one_;                         // the kernels read these logits without rounding them first
  const std::int16_t* line_ = nullptr;  // the open row
  std::int32_t top_ = 0;
  std::vector<std::int16_t> rounded_;
  std::vector<std::uint32_t> weights_;  // of the prepared row, up to a whole block
  std::uint64_t total_ = 0;
  double inverse_ = 0;
  std::uint32_t block_sums_[kMaxBlocks] = {};  // defined, because quantizers are copied
  std::uint32_t group_sums_[kMaxBlocks * kRowGroup] = {};
};

// Intervals of chosen symbols. logits [rows, codebook], symbols/starts/freqs [rows].
void intervals(const Logits& logits, const std::int32_t* symbols, std::int64_t rows, int prob_bits,
               int threads, std::int32_t* starts, std::int32_t* freqs);

// Strictly increasing tables from 0 to 2^prob_bits. logits [rows, codebook],
// cdf [rows, codebook + 1].
void cdf_table(const Logits& logits, std::int64_t rows, int prob_bits, int threads,
               std::int32_t* cdf);

}  // namespace percov2
