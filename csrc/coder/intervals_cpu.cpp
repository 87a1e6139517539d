#include <algorithm>
#include <cstddef>
#include <stdexcept>
#include <string>

#include "coder/intervals.h"
#include "coder/rans.h"
#include "support/isa.h"
#include "support/parallel.h"

namespace percov2 {
namespace {

const IntervalKernels& active_kernels() {
  switch (active_isa()) {
#if defined(PERCOV2_X86_KERNELS)
    case Isa::kAvx2:
      return kAvx2Intervals;
    case Isa::kAvx512:
      return kAvx512Intervals;
#elif defined(PERCOV2_NEON_KERNELS)
    case Isa::kNeon:
      return kNeonIntervals;
#endif
    default:
      return kScalarIntervals;
  }
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

RowQuantizer::RowQuantizer(const Logits& logits, int prob_bits)
    : kernels_(active_kernels()), logits_(logits) {
  check_codebook(logits.codebook, prob_bits);
  blocks_ = (logits.codebook + kRowBlock - 1) / kRowBlock;
  spread_ = (std::uint64_t{1} << prob_bits) - static_cast<std::uint64_t>(logits.codebook);
  in_one_ = logits.type != LogitType::kInt16 && kernels_.share_floats != nullptr;
}

void RowQuantizer::check_finite(bool finite, std::int64_t row) {
  if (finite) return;
  throw std::invalid_argument("row " + std::to_string(row) +
                              " of the logits holds NaN or +inf, or nothing finite");
}

void RowQuantizer::open(std::int64_t row) {
  if (logits_.type == LogitType::kInt16) {
    line_ = at<std::int16_t>(row);
    top_ = kernels_.row_max(line_, logits_.codebook);
    return;
  }
  rounded_.resize(static_cast<std::size_t>(logits_.codebook));
  check_finite(
      logits_.type == LogitType::kFloat32
          ? kernels_.round_floats(at<float>(row), logits_.codebook, rounded_.data())
          : kernels_.round_bfloats(at<std::uint16_t>(row), logits_.codebook, rounded_.data()),
      row);
  line_ = rounded_.data();
  top_ = 0;  // rounding is relative to the largest
}

Interval RowQuantizer::between(const Share& share, double inverse, std::int64_t symbol) const {
  // floor(prefix * spread / total) + index. The product with the inverse is off by less than one,
  // because the quotient is below 2^20 and three roundings err by less than 2^-50 of it.
  const auto boundary = [&](std::uint64_t prefix, std::int64_t index) {
    const auto numerator = static_cast<std::int64_t>(prefix * spread_);  // < 2^56
    const auto total = static_cast<std::int64_t>(share.total);
    auto quotient = static_cast<std::int64_t>(static_cast<double>(numerator) * inverse);
    const std::int64_t remainder = numerator - quotient * total;
    quotient += static_cast<std::int64_t>(remainder >= total);
    quotient -= static_cast<std::int64_t>(remainder < 0);
    return static_cast<std::uint32_t>(quotient + index);
  };
  const std::uint32_t start = boundary(share.prefix, symbol);
  return {start, boundary(share.prefix + share.weight, symbol + 1) - start};
}

Interval RowQuantizer::interval(std::int64_t row, std::int32_t symbol) {
  Share share{};
  if (!in_one_) {
    open(row);
    share = kernels_.share(line_, logits_.codebook, top_, symbol);
  } else if (logits_.type == LogitType::kFloat32) {
    check_finite(kernels_.share_floats(at<float>(row), logits_.codebook, symbol, &share), row);
  } else {
    check_finite(kernels_.share_bfloats(at<std::uint16_t>(row), logits_.codebook, symbol, &share),
                 row);
  }
  return between(share, 1.0 / static_cast<double>(share.total), symbol);
}

void RowQuantizer::bounds(std::int64_t row, std::int32_t* cdf) {
  open(row);
  const std::uint64_t total = kernels_.share(line_, logits_.codebook, top_, 0).total;
  std::uint64_t prefix = 0;
  for (std::int64_t i = 0; i < logits_.codebook; ++i) {
    cdf[i] = static_cast<std::int32_t>(prefix * spread_ / total) + static_cast<std::int32_t>(i);
    prefix += logit_weight(top_ - line_[i]);
  }
  cdf[logits_.codebook] =
      static_cast<std::int32_t>(spread_) + static_cast<std::int32_t>(logits_.codebook);
}

void RowQuantizer::prepare(std::int64_t row) {
  weights_.resize(static_cast<std::size_t>(blocks_ * kRowBlock));
  std::uint32_t* const weights = weights_.data();
  if (!in_one_) {
    open(row);
    kernels_.weigh(line_, logits_.codebook, top_, weights, group_sums_, block_sums_);
  } else if (logits_.type == LogitType::kFloat32) {
    check_finite(
        kernels_.weigh_floats(at<float>(row), logits_.codebook, weights, group_sums_, block_sums_),
        row);
  } else {
    check_finite(kernels_.weigh_bfloats(at<std::uint16_t>(row), logits_.codebook, weights,
                                        group_sums_, block_sums_),
                 row);
  }
  total_ = 0;
  for (std::int64_t b = 0; b < blocks_; ++b) total_ += block_sums_[b];
  inverse_ = 1.0 / static_cast<double>(total_);
}

void RowQuantizer::find(std::uint32_t target, Found* found) const {
  // start_i <= target  <=>  P_i * (M - V) + i * S < (target + 1) * S; true for i = 0, and false
  // from some i on. Both sides stay below 2^56.
  const std::uint64_t bound = (static_cast<std::uint64_t>(target) + 1) * total_;
  std::uint64_t prefix = 0;
  std::uint64_t before = 0;  // of the block that holds the symbol
  std::int64_t block = 0;
  for (std::int64_t b = 1; b < blocks_; ++b) {
    prefix += block_sums_[b - 1];
    const bool reached =
        prefix * spread_ + static_cast<std::uint64_t>(b * kRowBlock) * total_ < bound;
    block += reached;
    before = reached ? prefix : before;
  }
  const std::int64_t first = block * kRowBlock;
  Place place;
  kernels_.search(weights_.data() + first, group_sums_ + block * kRowGroup,
                  std::min(kRowBlock, logits_.codebook - first), spread_, total_,
                  bound - before * spread_ - static_cast<std::uint64_t>(first) * total_, &place);
  const std::int64_t symbol = first + place.index;
  const Interval interval =
      between({before + place.prefix, total_, place.weight}, inverse_, symbol);
  *found = {static_cast<std::int32_t>(symbol), interval.start, interval.freq};
}

void intervals(const Logits& logits, const std::int32_t* symbols, std::int64_t rows, int prob_bits,
               int threads, std::int32_t* starts, std::int32_t* freqs) {
  check_codebook(logits.codebook, prob_bits);
  parallel_ranges(rows, threads, [&](std::int64_t first, std::int64_t last) {
    RowQuantizer quantizer(logits, prob_bits);
    for (std::int64_t row = first; row < last; ++row) {
      const std::int32_t symbol = symbols[row];  // read once: the caller's memory may change
      if (symbol < 0 || symbol >= logits.codebook) {
        throw std::invalid_argument("symbol " + std::to_string(symbol) + " at row " +
                                    std::to_string(row) + " is not in 0 .. " +
                                    std::to_string(logits.codebook - 1));
      }
      const Interval interval = quantizer.interval(row, symbol);
      starts[row] = static_cast<std::int32_t>(interval.start);
      freqs[row] = static_cast<std::int32_t>(interval.freq);
    }
  });
}

void cdf_table(const Logits& logits, std::int64_t rows, int prob_bits, int threads,
               std::int32_t* cdf) {
  check_codebook(logits.codebook, prob_bits);
  parallel_ranges(rows, threads, [&](std::int64_t first, std::int64_t last) {
    RowQuantizer quantizer(logits, prob_bits);
    for (std::int64_t row = first; row < last; ++row) {
      quantizer.bounds(row, cdf + row * (logits.codebook + 1));
    }
  });
}

}  // namespace percov2
