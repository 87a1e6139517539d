// One long stream of several interleaved rANS states. Symbol i belongs to lane i mod L, all lanes
// share one sequence of bytes, so that a single stream keeps a processor busy: the states of
// neighbouring symbols do not wait for each other. docs/lanes.md is the format, to the byte.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "byte_stack.h"
#include "intervals.h"
#include "rans.h"

namespace percov2 {

constexpr int kMaxLanes = 64;
constexpr int kLaneHeadBytes = 4;  // one state, big-endian

// A stack: what is pushed last is decoded first.
class LaneEncoder {
 public:
  // Throws std::invalid_argument unless 1 <= lanes <= 64 and check fits 16 bits.
  LaneEncoder(std::int64_t lanes, std::int64_t check);

  // Pushes `count` symbols, the last one first. Either all are pushed or none.
  void push(const std::int32_t* starts, const std::int32_t* freqs, std::int64_t count,
            int prob_bits);
  // Length of the stream that the stack would become now.
  std::int64_t size() const;
  // Writes that stream: size() bytes. Does not change the stack.
  void finish(std::uint8_t* buffer) const;

 private:
  // The lane of the symbol that is pushed as the i-th is i mod L here: how many symbols follow is
  // not known yet. finish() puts the states into the decoder's order.
  std::vector<std::uint32_t> states_;
  std::int64_t pushed_ = 0;
  ByteStack emitted_;
};

// Reads a stream forward, symbol by symbol.
class LaneDecoder {
 public:
  // Copies the stream. Throws std::invalid_argument unless 1 <= lanes <= 64 and the stream begins
  // with that many states in 2^23 .. 2^31 - 1.
  LaneDecoder(const std::uint8_t* stream, std::int64_t size, std::int64_t lanes);

  // logits [count, codebook] -> symbols [count].
  void decode_logits(const Logits& logits, std::int64_t count, int prob_bits,
                     std::int32_t* symbols);
  // cdf [count, codebook + 1] -> symbols [count].
  void decode_cdf(const std::int32_t* cdf, std::int64_t count, std::int64_t codebook, int prob_bits,
                  std::int32_t* symbols);
  // Whether all lanes hold their initial states, all bytes are used up and none was missing.
  bool finished(std::int64_t check) const;

 private:
  // prepare(first, last) comes before find(i, target) for i = first .. last - 1 and may throw;
  // find gives the symbol of row i whose interval holds target.
  template <class Prepare, class Find>
  void decode(std::int64_t count, int prob_bits, std::int32_t* symbols, Prepare&& prepare,
              Find&& find);

  std::vector<std::uint8_t> bytes_;  // without the head; four zeros behind the end
  std::int64_t end_ = 0;
  std::int64_t position_ = 0;
  bool short_ = false;  // a byte beyond the end was asked for
  std::vector<std::uint32_t> states_;
  std::int64_t decoded_ = 0;
};

}  // namespace percov2
