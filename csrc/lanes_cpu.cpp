// One stream of interleaved rANS states on the CPU.

#include <algorithm>
#include <cstddef>
#include <stdexcept>
#include <string>

#include "coder.h"
#include "lanes.h"

namespace percov2 {
namespace {

// Symbols between two looks at the room in the stack.
constexpr std::int64_t kBlock = 4096;

// Rows that are looked at before the first symbol of them is decoded: that work does not wait for
// any state.
constexpr std::int64_t kTogether = 16;

void check_lanes(std::int64_t lanes) {
  if (lanes < 1 || lanes > kMaxLanes) {
    throw std::invalid_argument("lanes is " + std::to_string(lanes) + "; it must be 1 .. " +
                                std::to_string(kMaxLanes));
  }
}

void check_check(std::int64_t check) {
  if (check < 0 || check > 0xFFFF) {
    throw std::invalid_argument("check " + std::to_string(check) + " does not fit 16 bits");
  }
}

}  // namespace

LaneEncoder::LaneEncoder(std::int64_t lanes, std::int64_t check) {
  check_lanes(lanes);
  check_check(check);
  states_.assign(static_cast<std::size_t>(lanes), kLowerBound);
  states_[0] += static_cast<std::uint32_t>(check);
}

void LaneEncoder::push(const std::int32_t* starts, const std::int32_t* freqs, std::int64_t count,
                       int prob_bits) {
  check_intervals(starts, freqs, count, prob_bits);
  const std::size_t lanes = states_.size();
  std::size_t lane = static_cast<std::size_t>(pushed_) % lanes;
  while (count > 0) {
    const std::int64_t steps = std::min(count, kBlock);
    std::uint8_t* top = emitted_.reserve(static_cast<std::size_t>(kMaxBytesPerSymbol * steps + 1));
    for (std::int64_t i = count - 1; i >= count - steps; --i) {
      const std::uint32_t x = states_[lane];
      const std::uint32_t freq = at_least_one(freqs[i]);
      const std::uint32_t bytes = surplus_bytes(x, freq, prob_bits);
      store_below(top, x);
      top -= bytes;
      states_[lane] =
          encode_symbol(x >> (8 * bytes), static_cast<std::uint32_t>(starts[i]), freq, prob_bits);
      if (++lane == lanes) lane = 0;
    }
    emitted_.move_top(top);
    count -= steps;
    pushed_ += steps;
  }
}

std::int64_t LaneEncoder::size() const {
  return static_cast<std::int64_t>(kLaneHeadBytes * states_.size() + emitted_.size());
}

void LaneEncoder::finish(std::uint8_t* buffer) const {
  // The first symbol was pushed last, so the decoder's lanes run the other way round.
  const std::size_t lanes = states_.size();
  std::size_t lane = (static_cast<std::size_t>(pushed_) + lanes - 1) % lanes;
  for (std::size_t k = 0; k < lanes; ++k) {
    buffer += kLaneHeadBytes;
    store_below(buffer, states_[lane]);
    lane = (lane + lanes - 1) % lanes;
  }
  std::copy_n(emitted_.data(), emitted_.size(), buffer);
}

LaneDecoder::LaneDecoder(const std::uint8_t* stream, std::int64_t size, std::int64_t lanes) {
  check_lanes(lanes);
  const std::int64_t head = kLaneHeadBytes * lanes;
  if (size < head) {
    throw std::invalid_argument("the stream has " + std::to_string(size) +
                                " bytes; the states of " + std::to_string(lanes) +
                                " lanes alone take " + std::to_string(head));
  }
  for (std::int64_t k = 0; k < lanes; ++k) {
    const std::uint32_t x = load_word(stream + kLaneHeadBytes * k);
    if (x < kLowerBound || x >= kStateEnd) {
      throw std::invalid_argument("lane " + std::to_string(k) + " begins with state " +
                                  std::to_string(x) + "; no encoder writes that");
    }
    states_.push_back(x);
  }
  end_ = size - head;
  bytes_.reserve(static_cast<std::size_t>(end_) + sizeof(std::uint32_t));
  bytes_.assign(stream + head, stream + size);
  bytes_.resize(static_cast<std::size_t>(end_) + sizeof(std::uint32_t), 0);
}

template <class Prepare, class Find>
void LaneDecoder::decode(std::int64_t count, int prob_bits, std::int32_t* symbols,
                         Prepare&& prepare, Find&& find) {
  // All on copies: whatever throws on the way leaves the decoder as it was.
  std::vector<std::uint32_t> states = states_;
  std::int64_t position = position_;
  bool fell_short = short_;
  const std::size_t lanes = states.size();
  std::size_t lane = static_cast<std::size_t>(decoded_) % lanes;
  for (std::int64_t first = 0; first < count; first += kTogether) {
    const std::int64_t last = std::min(first + kTogether, count);
    prepare(first, last);
    for (std::int64_t i = first; i < last; ++i) {
      const Found found = find(i, slot(states[lane], prob_bits));
      symbols[i] = found.symbol;
      const std::uint32_t x = advance(states[lane], found.start, found.freq, prob_bits);
      const std::uint32_t bytes = lacking_bytes(x);
      states[lane] = shift_in(x, load_word(bytes_.data() + position), bytes);
      position += bytes;
      if (position > end_) {
        position = end_;
        fell_short = true;
      }
      if (++lane == lanes) lane = 0;
    }
  }
  states_ = states;
  position_ = position;
  short_ = fell_short;
  decoded_ += count;
}

void LaneDecoder::decode_logits(const Logits& logits, std::int64_t count, int prob_bits,
                                std::int32_t* symbols) {
  std::vector<RowQuantizer> rows(static_cast<std::size_t>(std::min(kTogether, count)),
                                 RowQuantizer(logits, prob_bits));
  std::int64_t prepared = 0;
  decode(
      count, prob_bits, symbols,
      [&](std::int64_t first, std::int64_t last) {
        prepared = first;
        for (std::int64_t i = first; i < last; ++i) {
          rows[static_cast<std::size_t>(i - first)].prepare(i);
        }
      },
      [&](std::int64_t i, std::uint32_t target) {
        return rows[static_cast<std::size_t>(i - prepared)].find(target);
      });
}

void LaneDecoder::decode_cdf(const std::int32_t* cdf, std::int64_t count, std::int64_t codebook,
                             int prob_bits, std::int32_t* symbols) {
  check_tables(cdf, 0, 0, codebook, prob_bits);  // also without a row
  decode(
      count, prob_bits, symbols,
      [&](std::int64_t first, std::int64_t last) {
        check_tables(cdf, first, last, codebook, prob_bits);
      },
      [&](std::int64_t i, std::uint32_t target) {
        return find_in_table(cdf + i * (codebook + 1), codebook, target);
      });
}

bool LaneDecoder::finished(std::int64_t check) const {
  check_check(check);
  if (short_ || position_ != end_) return false;
  const std::size_t lanes = states_.size();
  const std::size_t last = (static_cast<std::size_t>(decoded_) + lanes - 1) % lanes;
  for (std::size_t k = 0; k < lanes; ++k) {
    const std::uint32_t initial =
        kLowerBound + (k == last ? static_cast<std::uint32_t>(check) : 0u);
    if (states_[k] != initial) return false;
  }
  return true;
}

}  // namespace percov2
