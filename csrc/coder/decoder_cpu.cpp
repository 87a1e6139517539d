// Batches of rANS streams on the CPU: the decoder.

#include <algorithm>
#include <cstddef>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "coder/coder.h"
#include "support/parallel.h"

namespace percov2 {
namespace {

// Streams that one thread decodes side by side. A long row keeps the thread busy without a second
// stream, whose rows lie elsewhere in memory.
std::int64_t streams_together(std::int64_t codebook) { return codebook <= 512 ? 2 : 1; }

constexpr std::int64_t kChecked = 8;   // tables that are checked together
constexpr std::int64_t kSearched = 8;  // trusted tables that are searched together

// Throws unless the interval holds the target, as every interval of a valid table does.
void check_found(const Found& found, std::uint32_t target, std::int64_t row, int prob_bits) {
  if (found.start <= target && target - found.start < found.freq &&
      found.freq <= (1u << prob_bits) - found.start) {
    return;
  }
  throw std::invalid_argument("cdf row " + std::to_string(row) +
                              " does not increase strictly from 0 to 2^prob_bits");
}

}  // namespace

BatchDecoder::BatchDecoder(std::vector<std::uint8_t> buffer, std::vector<std::int64_t> offsets,
                           bool resumed, std::vector<std::uint32_t> states,
                           const std::vector<std::int64_t>& positions)
    : buffer_(std::move(buffer)), offsets_(std::move(offsets)), states_(std::move(states)) {
  if (offsets_.empty()) {
    throw std::invalid_argument("offsets is empty; it must hold one number more than streams");
  }
  const auto length = static_cast<std::int64_t>(buffer_.size());
  for (std::size_t b = 0; b < offsets_.size(); ++b) {
    const std::int64_t least = b == 0 ? 0 : offsets_[b - 1];
    if (offsets_[b] < least || offsets_[b] > length) {
      throw std::invalid_argument("offsets[" + std::to_string(b) + "] is " +
                                  std::to_string(offsets_[b]) + "; it must lie in " +
                                  std::to_string(least) + " .. " + std::to_string(length));
    }
  }
  const std::size_t streams = offsets_.size() - 1;
  if (resumed && (states_.size() != streams || positions.size() != streams)) {
    throw std::invalid_argument("states has " + std::to_string(states_.size()) +
                                " and positions has " + std::to_string(positions.size()) +
                                " numbers for " + std::to_string(streams) + " streams");
  }
  next_.resize(streams);
  canonical_.assign(streams, true);
  if (!resumed) states_.assign(streams, 0);
  for (std::size_t b = 0; b < streams; ++b) {
    const std::int64_t stream_length = offsets_[b + 1] - offsets_[b];
    if (states_[b] >= kStateEnd) {
      throw std::invalid_argument("states[" + std::to_string(b) + "] is " +
                                  std::to_string(states_[b]) + "; it must be below 2^31");
    }
    const std::int64_t position = resumed ? positions[b] : 0;
    if (position < 0 || position > stream_length) {
      throw std::invalid_argument("positions[" + std::to_string(b) + "] is " +
                                  std::to_string(position) + "; the stream has " +
                                  std::to_string(stream_length) + " bytes");
    }
    next_[b] = offsets_[b] + position;
    if (!resumed && stream_length > 0) {
      canonical_[b] = buffer_[static_cast<std::size_t>(offsets_[b])] != 0;
    }
    states_[b] = refill(states_[b], buffer_.data(), next_[b], offsets_[b + 1]);
  }
}

void BatchDecoder::check_streams(const std::int64_t* streams, std::int64_t rows) const {
  std::vector<bool> seen(states_.size(), false);
  for (std::int64_t row = 0; row < rows; ++row) {
    if (streams[row] < 0 || streams[row] >= size()) {
      throw std::invalid_argument("streams[" + std::to_string(row) + "] is " +
                                  std::to_string(streams[row]) + "; there are " +
                                  std::to_string(size()) + " streams");
    }
    const auto stream = static_cast<std::size_t>(streams[row]);
    if (seen[stream]) {
      throw std::invalid_argument("stream " + std::to_string(streams[row]) + " is named twice");
    }
    seen[stream] = true;
  }
}

void BatchDecoder::step(std::int64_t stream, std::uint32_t start, std::uint32_t freq,
                        int prob_bits) {
  const auto b = static_cast<std::size_t>(stream);
  std::uint32_t x = states_[b];
  const bool whole = x >= kLowerBound && offsets_[b + 1] - next_[b] >= 4;
  x = advance(x, start, freq, prob_bits);
  if (whole) {
    // No branch: such a state keeps at least 3 bits, and 4 readable bytes follow.
    const std::uint32_t bytes = lacking_bytes(x);
    x = shift_in(x, load_word(buffer_.data() + next_[b]), bytes);
    next_[b] += bytes;
  } else {
    x = refill(x, buffer_.data(), next_[b], offsets_[b + 1]);
  }
  states_[b] = x;
}

template <class Decode>
void BatchDecoder::undo_if_it_throws(Decode&& decode) {
  const std::vector<std::uint32_t> states = states_;
  const std::vector<std::int64_t> next = next_;
  try {
    decode();
  } catch (...) {
    states_ = states;
    next_ = next;
    throw;
  }
}

void BatchDecoder::decode_logits(const Logits& logits, const std::int64_t* streams,
                                 std::int64_t rows, std::int64_t count, int prob_bits, int threads,
                                 std::int32_t* symbols) {
  check_codebook(logits.codebook, prob_bits);
  check_streams(streams, rows);
  const std::int64_t together = streams_together(logits.codebook);
  undo_if_it_throws([&] {
    parallel_ranges(rows, threads, [&](std::int64_t first, std::int64_t last) {
      // A stream's next state depends on its last symbol, but streams are independent. So a few are
      // decoded together, and the processor works on one while another waits.
      std::vector<RowQuantizer> quantizers(
          static_cast<std::size_t>(std::min(together, last - first)),
          RowQuantizer(logits, prob_bits));
      for (; first < last; first += together) {
        const std::int64_t some = std::min(together, last - first);
        for (std::int64_t i = first * count; i < (first + 1) * count; ++i) {
          for (std::int64_t r = 0; r < some; ++r) {
            quantizers[static_cast<std::size_t>(r)].prepare(i + r * count);
          }
          for (std::int64_t r = 0; r < some; ++r) {
            const std::int64_t stream = streams[first + r];
            const std::uint32_t target = slot(states_[static_cast<std::size_t>(stream)], prob_bits);
            Found found;
            quantizers[static_cast<std::size_t>(r)].find(target, &found);
            symbols[i + r * count] = found.symbol;
            step(stream, found.start, found.freq, prob_bits);
          }
        }
      }
    });
  });
}

void BatchDecoder::decode_cdf(const std::int32_t* cdf, const std::int64_t* streams,
                              std::int64_t rows, std::int64_t count, std::int64_t codebook,
                              int prob_bits, bool trusted, int threads, std::int32_t* symbols) {
  check_prob_bits(prob_bits);
  check_streams(streams, rows);
  check_tables(cdf, 0, 0, codebook, prob_bits);  // checks prob_bits even without rows
  if (trusted) {
    undo_if_it_throws([&] {
      parallel_ranges(rows, threads, [&](std::int64_t first, std::int64_t last) {
        for (; first < last; first += kSearched) {
          const std::int64_t some = std::min(kSearched, last - first);
          decode_trusted(cdf, streams, first, some, count, codebook, prob_bits, symbols);
        }
      });
    });
    return;
  }
  undo_if_it_throws([&] {
    parallel_ranges(rows, threads, [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t row = first; row < last; ++row) {
        const std::int64_t stream = streams[row];
        for (std::int64_t i = row * count; i < (row + 1) * count; ++i) {
          // Tables are checked a few rows ahead of decoding, so that they are in cache.
          if ((i - row * count) % kChecked == 0) {
            check_tables(cdf, i, std::min(i + kChecked, (row + 1) * count), codebook, prob_bits);
          }
          const std::uint32_t target = slot(states_[static_cast<std::size_t>(stream)], prob_bits);
          const Found found = find_in_table(cdf + i * (codebook + 1), codebook, target);
          symbols[i] = found.symbol;
          step(stream, found.start, found.freq, prob_bits);
        }
      }
    });
  });
}

void BatchDecoder::decode_trusted(const std::int32_t* cdf, const std::int64_t* streams,
                                  std::int64_t first, std::int64_t some, std::int64_t count,
                                  std::int64_t codebook, int prob_bits, std::int32_t* symbols) {
  const std::int32_t* tables[kSearched];
  std::uint32_t targets[kSearched];
  Found found[kSearched];
  for (std::int64_t i = first * count; i < (first + 1) * count; ++i) {
    for (std::int64_t r = 0; r < some; ++r) {
      tables[r] = cdf + (i + r * count) * (codebook + 1);
      targets[r] = slot(states_[static_cast<std::size_t>(streams[first + r])], prob_bits);
    }
    find_in_tables(tables, some, codebook, targets, found);
    for (std::int64_t r = 0; r < some; ++r) {
      check_found(found[r], targets[r], i + r * count, prob_bits);
      symbols[i + r * count] = found[r].symbol;
      step(streams[first + r], found[r].start, found[r].freq, prob_bits);
    }
  }
}

std::vector<std::int64_t> BatchDecoder::positions() const {
  std::vector<std::int64_t> result(next_.size());
  for (std::size_t b = 0; b < next_.size(); ++b) result[b] = next_[b] - offsets_[b];
  return result;
}

bool BatchDecoder::exhausted(std::int64_t stream) const {
  const auto b = static_cast<std::size_t>(stream);
  return states_[b] < kLowerBound && next_[b] == offsets_[b + 1];
}

bool BatchDecoder::finished(std::int64_t stream, std::uint32_t check) const {
  const auto b = static_cast<std::size_t>(stream);
  return canonical_[b] && states_[b] == check && next_[b] == offsets_[b + 1];
}

}  // namespace percov2
