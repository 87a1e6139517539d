// The rANS state machine: one source for the CPU and for CUDA devices.
//
// A 32-bit state x with lower bound L = 2^23 is renormalised byte by byte. The encoder starts from
// a 16-bit check x0 < L, so the bytes of a stream are a function of check and symbols. It emits no
// byte until the state has grown. After the first byte the state stays in [L, 2^31) between
// symbols, so the decoder may shift in "while x < L and a byte remains". The method: J. Duda,
// "Asymmetric numeral systems", arXiv 1311.2540.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PERCOV2_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PERCOV2_HOST_DEVICE inline
#endif

namespace percov2 {

constexpr std::uint32_t kLowerBound = 1u << 23;
constexpr std::uint32_t kStateEnd = 1u << 31;  // every state is below this
constexpr int kMinProbBits = 8;
constexpr int kMaxProbBits = 20;
// A symbol of probability 2^-20 moves at most three bytes out of a 31-bit state.
constexpr int kMaxBytesPerSymbol = 3;

// True iff one symbol's interval lies in [0, 2^prob_bits) and is not empty.
PERCOV2_HOST_DEVICE bool valid_interval(std::int64_t start, std::int64_t freq, int prob_bits) {
  return start >= 0 && freq >= 1 && start + freq <= (std::int64_t{1} << prob_bits);
}

// A checked frequency, read again before a division. Another thread may have set it to 0; the
// stream is then worthless, but the program does not crash.
PERCOV2_HOST_DEVICE std::uint32_t at_least_one(std::int32_t freq) {
  return static_cast<std::uint32_t>(freq) + static_cast<std::uint32_t>(freq == 0);
}

// The number of bytes that must leave a state before a symbol of this frequency is encoded: 0 to 3.
// They are the lowest bytes of x, lowest first. Requires x < 2^31 and a valid interval.
PERCOV2_HOST_DEVICE std::uint32_t surplus_bytes(std::uint32_t x, std::uint32_t freq,
                                                int prob_bits) {
  const std::uint32_t limit = freq << (31 - prob_bits);
  return static_cast<std::uint32_t>(x >= limit) + static_cast<std::uint32_t>((x >> 8) >= limit) +
         static_cast<std::uint32_t>((x >> 16) >= limit);
}

// The state without its surplus bytes: x >> (8 * surplus_bytes()), by independent selections.
PERCOV2_HOST_DEVICE std::uint32_t without_surplus(std::uint32_t x, std::uint32_t freq,
                                                  int prob_bits) {
  const std::uint32_t limit = freq << (31 - prob_bits);
  const std::uint32_t few = x >= limit ? x >> 8 : x;
  const std::uint32_t many = (x >> 16) >= limit ? x >> 24 : x >> 16;
  return (x >> 8) >= limit ? many : few;
}

// Writes a state below `top`, its lowest byte at the highest address, as a decoder reads it. An
// encoder stores all four bytes and moves `top` by the surplus; later stores overwrite the others.
PERCOV2_HOST_DEVICE void store_below(std::uint8_t* top, std::uint32_t x) {
  top[-1] = static_cast<std::uint8_t>(x);
  top[-2] = static_cast<std::uint8_t>(x >> 8);
  top[-3] = static_cast<std::uint8_t>(x >> 16);
  top[-4] = static_cast<std::uint8_t>(x >> 24);
}

// Encodes one symbol into a state without surplus bytes. Returns the new state, < 2^31. It is never
// smaller than x, and at least L if bytes have left, so a state that has reached L stays there.
PERCOV2_HOST_DEVICE std::uint32_t encode_symbol(std::uint32_t x, std::uint32_t start,
                                                std::uint32_t freq, int prob_bits) {
  return ((x / freq) << prob_bits) + (x % freq) + start;
}

// Bytes of the last state at the head of a stream, big-endian without leading zeros: 0 to 4.
PERCOV2_HOST_DEVICE int head_bytes(std::uint32_t x) {
  return (x > 0u) + (x > 0xFFu) + (x > 0xFFFFu) + (x > 0xFFFFFFu);
}

// The number in [0, 2^prob_bits) whose interval determines the next symbol.
PERCOV2_HOST_DEVICE std::uint32_t slot(std::uint32_t x, int prob_bits) {
  return x & ((1u << prob_bits) - 1u);
}

// Removes one decoded symbol from the state. Requires start <= slot < start + freq.
PERCOV2_HOST_DEVICE std::uint32_t advance(std::uint32_t x, std::uint32_t start, std::uint32_t freq,
                                          int prob_bits) {
  return freq * (x >> prob_bits) + slot(x, prob_bits) - start;
}

// Shifts bytes in while x < L and position < end. Nothing is shifted in beyond the end, so the
// state can return to the encoder's small initial state.
PERCOV2_HOST_DEVICE std::uint32_t refill(std::uint32_t x, const std::uint8_t* bytes,
                                         std::int64_t& position, std::int64_t end) {
  while (x < kLowerBound && position < end) {
    x = (x << 8) | bytes[position++];
  }
  return x;
}

// The number of bytes that a state in [L, 2^31) lacks after advance(): 0 to 3.
PERCOV2_HOST_DEVICE std::uint32_t lacking_bytes(std::uint32_t x) {
  return static_cast<std::uint32_t>(x < kLowerBound) +
         static_cast<std::uint32_t>(x < (kLowerBound >> 8)) +
         static_cast<std::uint32_t>(x < (kLowerBound >> 16));
}

// Four bytes, the first one highest.
PERCOV2_HOST_DEVICE std::uint32_t load_word(const std::uint8_t* bytes) {
  return std::uint32_t{bytes[0]} << 24 | std::uint32_t{bytes[1]} << 16 |
         std::uint32_t{bytes[2]} << 8 | std::uint32_t{bytes[3]};
}

// Shifts in the first `bytes` of the four bytes of `word`.
PERCOV2_HOST_DEVICE std::uint32_t shift_in(std::uint32_t x, std::uint32_t word,
                                           std::uint32_t bytes) {
  return static_cast<std::uint32_t>((std::uint64_t{x} << 32 | word) << (8 * bytes) >> 32);
}

}  // namespace percov2
