// Batches of rANS stacks on the CPU: the encoder.

#include <cstddef>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "coder.h"
#include "parallel.h"

namespace percov2 {

BatchEncoder::BatchEncoder(std::vector<std::uint32_t> checks)
    : states_(std::move(checks)), emitted_(states_.size()), quiet_(states_.size(), 0) {
  for (const std::uint32_t check : states_) {
    if (check > 0xFFFFu) {
      throw std::invalid_argument("check " + std::to_string(check) + " does not fit 16 bits");
    }
  }
}

void BatchEncoder::push(const std::int32_t* starts, const std::int32_t* freqs, std::int64_t total,
                        const std::int64_t* counts, int prob_bits, int threads) {
  check_prob_bits(prob_bits);
  std::vector<std::int64_t> offsets(states_.size() + 1, 0);
  for (std::size_t b = 0; b < states_.size(); ++b) {
    // Compared by subtraction: the sum of hostile counts could overflow.
    if (counts[b] < 0 || counts[b] > total - offsets[b]) {
      throw std::invalid_argument("counts[" + std::to_string(b) + "] is " +
                                  std::to_string(counts[b]) + " with " +
                                  std::to_string(total - offsets[b]) + " intervals left");
    }
    offsets[b + 1] = offsets[b] + counts[b];
  }
  if (offsets.back() != total) {
    throw std::invalid_argument("counts sum to " + std::to_string(offsets.back()) + ", but " +
                                std::to_string(total) + " intervals were given");
  }
  for (std::int64_t i = 0; i < total; ++i) {
    if (!valid_interval(starts[i], freqs[i], prob_bits)) {
      throw std::invalid_argument("interval " + std::to_string(i) + " (start " +
                                  std::to_string(starts[i]) + ", freq " + std::to_string(freqs[i]) +
                                  ") is empty or not inside 0 .. 2^" + std::to_string(prob_bits));
    }
  }
  parallel_ranges(size(), threads, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t b = first; b < last; ++b) {
      const auto stream = static_cast<std::size_t>(b);
      std::uint32_t x = states_[stream];
      std::vector<std::uint8_t>& bytes = emitted_[stream];
      for (std::int64_t i = offsets[stream + 1] - 1; i >= offsets[stream]; --i) {
        x = encode_symbol(x, static_cast<std::uint32_t>(starts[i]),
                          static_cast<std::uint32_t>(freqs[i]), prob_bits,
                          [&bytes](std::uint8_t byte) { bytes.push_back(byte); });
        if (bytes.empty() && x < kLowerBound) ++quiet_[stream];
      }
      states_[stream] = x;
    }
  });
}

void BatchEncoder::finish(std::vector<std::uint8_t>& buffer,
                          std::vector<std::int64_t>& offsets) const {
  buffer.clear();
  offsets.assign(1, 0);
  for (std::size_t b = 0; b < states_.size(); ++b) {
    int bytes = 0;
    while (bytes < 4 && (states_[b] >> (8 * bytes)) != 0) ++bytes;
    while (bytes > 0) buffer.push_back(static_cast<std::uint8_t>(states_[b] >> (8 * --bytes)));
    buffer.insert(buffer.end(), emitted_[b].rbegin(), emitted_[b].rend());
    offsets.push_back(static_cast<std::int64_t>(buffer.size()));
  }
}

}  // namespace percov2
