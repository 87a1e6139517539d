// The batch API of the coder: many independent streams, flat arrays in, flat arrays out.
// It is independent of Python. Arguments that could lead out of bounds are checked and raise
// std::invalid_argument (ValueError in Python).
#pragma once

#include <cstdint>
#include <vector>

#include "coder/byte_stack.h"
#include "coder/intervals.h"
#include "coder/rans.h"

namespace percov2 {

// Throws std::invalid_argument unless prob_bits and all intervals are valid.
void check_intervals(const std::int32_t* starts, const std::int32_t* freqs, std::int64_t total,
                     int prob_bits);
// Throws std::invalid_argument unless prob_bits is valid and the rows first .. last - 1 of cdf
// [rows, codebook + 1] increase strictly from 0 to 2^prob_bits.
void check_tables(const std::int32_t* cdf, std::int64_t first, std::int64_t last,
                  std::int64_t codebook, int prob_bits);

// A batch of rANS stacks: the symbol pushed last is decoded first.
class BatchEncoder {
 public:
  explicit BatchEncoder(std::vector<std::uint32_t> checks);
  // Continues finished streams: stream b is bytes[offsets[b] .. offsets[b + 1]) and has quiet[b]
  // symbols before its output. Throws for streams that no encoder writes.
  BatchEncoder(const std::uint8_t* bytes, std::int64_t size,
               const std::vector<std::int64_t>& offsets, std::vector<std::int64_t> quiet);

  std::int64_t size() const { return static_cast<std::int64_t>(states_.size()); }
  // Pushes counts[b] symbols on stream b, the last one first. Either all are pushed or none.
  void push(const std::int32_t* starts, const std::int32_t* freqs, std::int64_t total,
            const std::int64_t* counts, int prob_bits, int threads);
  // Number of symbols that a decoder reads with no byte left and a state below L.
  const std::vector<std::int64_t>& symbols_before_output() const { return quiet_; }
  // The begin of each stream in the output of finish(), and the end of the last one.
  std::vector<std::int64_t> offsets() const;
  // Writes the streams one after another: offsets().back() bytes. The stacks do not change.
  void finish(std::uint8_t* buffer) const;

 private:
  std::vector<std::uint32_t> states_;
  std::vector<ByteStack> emitted_;
  std::vector<std::int64_t> quiet_;
};

// A batch of streams read forward, symbol by symbol.
class BatchDecoder {
 public:
  // offsets: size() + 1 numbers, not decreasing, inside the buffer. Reading begins at the start of
  // every stream. If resumed, it begins at each stream's state and next byte (position).
  BatchDecoder(std::vector<std::uint8_t> buffer, std::vector<std::int64_t> offsets, bool resumed,
               std::vector<std::uint32_t> states, const std::vector<std::int64_t>& positions);

  std::int64_t size() const { return static_cast<std::int64_t>(states_.size()); }
  // logits [rows, count, codebook] -> symbols [rows, count]; row r belongs to stream streams[r].
  // Nothing is decoded if it throws.
  void decode_logits(const Logits& logits, const std::int64_t* streams, std::int64_t rows,
                     std::int64_t count, int prob_bits, int threads, std::int32_t* symbols);
  // cdf [rows, count, codebook + 1] -> symbols [rows, count]. Trusted tables are not read whole:
  // only the interval that the search finds is checked.
  void decode_cdf(const std::int32_t* cdf, const std::int64_t* streams, std::int64_t rows,
                  std::int64_t count, std::int64_t codebook, int prob_bits, bool trusted,
                  int threads, std::int32_t* symbols);

  const std::vector<std::uint32_t>& states() const { return states_; }
  std::vector<std::int64_t> positions() const;
  bool exhausted(std::int64_t stream) const;
  bool finished(std::int64_t stream, std::uint32_t check) const;

 private:
  // Decodes `some` streams of trusted tables side by side, from row `first` on.
  void decode_trusted(const std::int32_t* cdf, const std::int64_t* streams, std::int64_t first,
                      std::int64_t some, std::int64_t count, std::int64_t codebook, int prob_bits,
                      std::int32_t* symbols);
  void check_streams(const std::int64_t* streams, std::int64_t rows) const;
  template <class Decode>
  void undo_if_it_throws(Decode&& decode);
  void step(std::int64_t stream, std::uint32_t start, std::uint32_t freq, int prob_bits);

  std::vector<std::uint8_t> buffer_;
  std::vector<std::int64_t> offsets_;
  std::vector<std::uint32_t> states_;
  std::vector<std::int64_t> next_;  // absolute position of the next byte
  std::vector<bool>
      canonical_;  // false: the stream starts with a zero byte, which no encoder writes
};

}  // namespace percov2
