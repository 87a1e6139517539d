// Batches of rANS stacks on the CPU: the encoder.

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "coder/coder.h"
#include "support/parallel.h"

namespace percov2 {
namespace {

// Streams per loop: their states are independent, so the latencies of their divisions overlap.
constexpr int kWidth = 8;
// Symbols per stream between two checks of the room in its stack.
constexpr std::int64_t kBlock = 1024;

// Symbols per stream that are copied side by side.
constexpr std::int64_t kTile = 64;

// One stream in the loop.
struct Lane {
  std::uint32_t x;
  const std::int32_t* start;  // one past the next interval
  const std::int32_t* freq;
  std::uint8_t* top;
  std::int64_t left;  // symbols to encode
  std::size_t stream;
};

// Encodes `steps` symbols of each of Width lanes, with 3 * steps + 1 free bytes below every top.
template <int Width>
void encode_lanes(Lane* lanes, std::int64_t steps, int prob_bits) {
  std::uint32_t x[Width];
  std::uint8_t* top[Width];
  for (int k = 0; k < Width; ++k) {
    x[k] = lanes[k].x;
    top[k] = lanes[k].top;
    lanes[k].left -= steps;
  }
  // Streams often lie a multiple of 4096 bytes apart and compete for the same cache lines. So a
  // tile of each is first copied side by side.
  std::uint32_t start[Width][kTile];
  std::uint32_t freq[Width][kTile];
  while (steps > 0) {
    const std::int64_t count = std::min(steps, kTile);
    for (int k = 0; k < Width; ++k) {
      lanes[k].start -= count;
      lanes[k].freq -= count;
      std::memcpy(start[k], lanes[k].start, static_cast<std::size_t>(count) * sizeof(start[k][0]));
      for (std::int64_t i = 0; i < count; ++i) freq[k][i] = at_least_one(lanes[k].freq[i]);
    }
    for (std::int64_t i = count - 1; i >= 0; --i) {
      for (int k = 0; k < Width; ++k) {
        const std::uint32_t bytes = surplus_bytes(x[k], freq[k][i], prob_bits);
        store_below(top[k], x[k]);
        top[k] -= bytes;
        x[k] = encode_symbol(x[k] >> (8 * bytes), start[k][i], freq[k][i], prob_bits);
      }
    }
    steps -= count;
  }
  for (int k = 0; k < Width; ++k) {
    lanes[k].x = x[k];
    lanes[k].top = top[k];
  }
}

using EncodeLanes = void (*)(Lane* lanes, std::int64_t steps, int prob_bits);
constexpr EncodeLanes kEncodeLanes[kWidth] = {encode_lanes<1>, encode_lanes<2>, encode_lanes<3>,
                                              encode_lanes<4>, encode_lanes<5>, encode_lanes<6>,
                                              encode_lanes<7>, encode_lanes<8>};

}  // namespace

BatchEncoder::BatchEncoder(std::vector<std::uint32_t> checks)
    : states_(std::move(checks)), emitted_(states_.size()), quiet_(states_.size(), 0) {
  for (const std::uint32_t check : states_) {
    if (check > 0xFFFFu) {
      throw std::invalid_argument("check " + std::to_string(check) + " does not fit 16 bits");
    }
  }
}

BatchEncoder::BatchEncoder(const std::uint8_t* bytes, std::int64_t size,
                           const std::vector<std::int64_t>& offsets,
                           std::vector<std::int64_t> quiet)
    : states_(quiet.size(), 0), emitted_(quiet.size()), quiet_(std::move(quiet)) {
  if (offsets.size() != quiet_.size() + 1) {
    throw std::invalid_argument("offsets has " + std::to_string(offsets.size()) + " numbers for " +
                                std::to_string(quiet_.size()) + " streams; it must have one more");
  }
  std::int64_t least = 0;
  for (const std::int64_t offset : offsets) {
    if (offset < least || offset > size) {
      throw std::invalid_argument("an offset is " + std::to_string(offset) + "; it must lie in " +
                                  std::to_string(least) + " .. " + std::to_string(size));
    }
    least = offset;
  }
  for (std::size_t b = 0; b < quiet_.size(); ++b) {
    // A decoder shifts in the state first; the remaining bytes were emitted.
    std::int64_t next = offsets[b];
    if (next < offsets[b + 1] && bytes[next] == 0) {
      throw std::invalid_argument("stream " + std::to_string(b) + " begins with a zero byte");
    }
    if (quiet_[b] < 0) {
      throw std::invalid_argument("quiet[" + std::to_string(b) + "] is " +
                                  std::to_string(quiet_[b]));
    }
    states_[b] = refill(0, bytes, next, offsets[b + 1]);
    const auto rest = static_cast<std::size_t>(offsets[b + 1] - next);
    if (rest == 0) continue;
    std::uint8_t* const top = emitted_[b].reserve(rest) - rest;
    std::memcpy(top, bytes + next, rest);
    emitted_[b].move_top(top);
  }
}

void BatchEncoder::push(const std::int32_t* starts, const std::int32_t* freqs, std::int64_t total,
                        const std::int64_t* counts, int prob_bits, int threads) {
  check_prob_bits(prob_bits);
  std::vector<std::int64_t> offsets(states_.size() + 1, 0);
  for (std::size_t b = 0; b < states_.size(); ++b) {
    // A subtraction, because the sum of hostile counts could overflow.
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
  check_intervals(starts, freqs, total, prob_bits);
  parallel_ranges(size(), threads, [&](std::int64_t first, std::int64_t last) {
    Lane lanes[kWidth];
    int live = 0;
    while (true) {
      for (; live < kWidth && first < last; ++first) {
        const auto b = static_cast<std::size_t>(first);
        Lane lane{states_[b], starts + offsets[b + 1], freqs + offsets[b + 1], nullptr, counts[b],
                  b};
        // The few symbols before any output are counted one by one. They emit nothing.
        for (; lane.left > 0; --lane.left) {
          const auto start = static_cast<std::uint32_t>(lane.start[-1]);
          const std::uint32_t freq = at_least_one(lane.freq[-1]);
          if (lane.x >= kLowerBound || surplus_bytes(lane.x, freq, prob_bits) > 0) break;
          lane.x = encode_symbol(lane.x, start, freq, prob_bits);
          --lane.start;
          --lane.freq;
          if (lane.x < kLowerBound) ++quiet_[b];
        }
        states_[b] = lane.x;
        if (lane.left > 0) lanes[live++] = lane;
      }
      if (live == 0) break;
      std::int64_t steps = kBlock;
      for (int k = 0; k < live; ++k) steps = std::min(steps, lanes[k].left);
      const auto room = static_cast<std::size_t>(kMaxBytesPerSymbol * steps + 1);
      for (int k = 0; k < live; ++k) lanes[k].top = emitted_[lanes[k].stream].reserve(room);
      kEncodeLanes[live - 1](lanes, steps, prob_bits);
      for (int k = live - 1; k >= 0; --k) {
        emitted_[lanes[k].stream].move_top(lanes[k].top);
        states_[lanes[k].stream] = lanes[k].x;
        if (lanes[k].left == 0) lanes[k] = lanes[--live];
      }
    }
  });
}

std::vector<std::int64_t> BatchEncoder::offsets() const {
  std::vector<std::int64_t> offsets(1, 0);
  offsets.reserve(states_.size() + 1);
  for (std::size_t b = 0; b < states_.size(); ++b) {
    const auto length = static_cast<std::size_t>(head_bytes(states_[b])) + emitted_[b].size();
    offsets.push_back(offsets.back() + static_cast<std::int64_t>(length));
  }
  return offsets;
}

void BatchEncoder::finish(std::uint8_t* buffer) const {
  for (std::size_t b = 0; b < states_.size(); ++b) {
    for (int bytes = head_bytes(states_[b]); bytes > 0;) {
      *buffer++ = static_cast<std::uint8_t>(states_[b] >> (8 * --bytes));
    }
    if (emitted_[b].size() > 0) std::memcpy(buffer, emitted_[b].data(), emitted_[b].size());
    buffer += emitted_[b].size();
  }
}

}  // namespace percov2
