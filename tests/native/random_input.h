// Seeded random inputs of the native tests, and memory that ends where nobody may read.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <vector>

#include "pages.h"
#include "support/isa.h"

namespace percov2_test {

// Instruction sets that this build has and this machine runs.
inline std::vector<percov2::Isa> instruction_sets() {
  std::vector<percov2::Isa> sets;
  for (int i = 0; i < percov2::kIsaCount; ++i) {
    const auto isa = static_cast<percov2::Isa>(i);
    if (percov2::isa_available(isa)) sets.push_back(isa);
  }
  return sets;
}

// SplitMix64: the same numbers on every machine, unlike the distributions of <random>.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}

  std::uint64_t bits() {
    std::uint64_t z = (state_ += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  // low .. high, both included.
  std::int64_t between(std::int64_t low, std::int64_t high) {
    const auto span = static_cast<std::uint64_t>(high) - static_cast<std::uint64_t>(low) + 1;
    return static_cast<std::int64_t>(static_cast<std::uint64_t>(low) +
                                     (span == 0 ? bits() : bits() % span));
  }
  bool one_in(std::int64_t n) { return between(1, n) == 1; }
  std::int64_t pick(std::initializer_list<std::int64_t> values) {
    return values.begin()[between(0, static_cast<std::int64_t>(values.size()) - 1)];
  }
  // Mostly small, rarely up to `most`: sizes.
  std::int64_t size(std::int64_t least, std::int64_t most) {
    const std::int64_t top = one_in(8) ? most : std::min(most, least + between(0, 40));
    return between(least, top);
  }
  // Numbers around the ends of the type that careless arithmetic trips over.
  std::int64_t hostile() {
    constexpr std::int64_t k32 = INT64_C(1) << 31;
    switch (between(0, 3)) {
      case 0:
        return pick({0, -1, 1, 2, 255, 256, 65535, 65536, k32 - 1, -k32, k32, INT64_MAX, INT64_MIN,
                     INT64_MIN + 1, INT64_MAX - 1});
      case 1:
        return between(-4, 40);
      case 2:
        return between(-k32, k32 - 1);
      default:
        return static_cast<std::int64_t>(bits());
    }
  }

 private:
  std::uint64_t state_;
};

// `count` elements whose end, or whose beginning, touches a page that nobody may use: also loads
// that sanitizers do not see (gathers, masked vectors) fault when they leave the array.
template <class T>
class Fenced {
 public:
  Fenced(std::int64_t count, bool fence_before = false) {
    const std::size_t page = page_size();
    const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T);
    const std::size_t body = (bytes + page - 1) / page * page;
    length_ = body + 2 * page;
    base_ = take_pages(length_);
    fence_pages(base_, page);
    fence_pages(base_ + page + body, page);
    data_ = reinterpret_cast<T*>(base_ + page + (fence_before ? 0 : body - bytes));
    count_ = count;
  }
  Fenced(const Fenced&) = delete;
  Fenced& operator=(const Fenced&) = delete;
  ~Fenced() { return_pages(base_, length_); }

  T* data() { return data_; }
  const T* data() const { return data_; }
  std::int64_t size() const { return count_; }
  T& operator[](std::int64_t i) { return data_[i]; }
  const T& operator[](std::int64_t i) const { return data_[i]; }

 private:
  unsigned char* base_;
  std::size_t length_;
  T* data_;
  std::int64_t count_;
};

// One row of int16 logits: every shape that a kernel may find hard.
inline void fill_logits(Random& random, std::int16_t* logits, std::int64_t count) {
  const std::int64_t kind = random.between(0, 8);
  const std::int64_t centre = random.between(-32768, 32767);
  const std::int64_t spread = random.pick({0, 1, 255, 256, 700, 5631, 5632, 8192, 65535});
  for (std::int64_t i = 0; i < count; ++i) {
    std::int64_t value = 0;
    switch (kind) {
      case 0:  // anything
        value = random.between(-32768, 32767);
        break;
      case 1:  // both ends
        value = random.one_in(2) ? -32768 : 32767;
        break;
      case 2:  // one level, the top or the bottom
        value = spread % 2 == 0 ? -32768 : 32767;
        break;
      case 3:  // a ramp over the whole range, up
        value = -32768 + i * 65535 / std::max<std::int64_t>(count - 1, 1);
        break;
      case 4:  // and down
        value = 32767 - i * 65535 / std::max<std::int64_t>(count - 1, 1);
        break;
      case 5:  // around multiples of an octave below the top
        value = 32767 - 256 * random.between(0, 24) - random.between(-1, 1);
        break;
      default:
        value = centre + random.between(-spread, spread);
    }
    logits[i] = static_cast<std::int16_t>(
        std::min<std::int64_t>(std::max<std::int64_t>(value, -32768), 32767));
  }
  if (kind == 6 || random.one_in(4)) {  // a peak, often at an end
    const std::int64_t at = random.pick({0, count - 1, random.between(0, count - 1)});
    logits[at] = static_cast<std::int16_t>(random.pick({32767, -32768, logits[at] / 2}));
  }
}

// A codebook size and prob_bits that fit each other.
struct Sizes {
  std::int64_t codebook;
  int prob_bits;
};

inline Sizes random_sizes(Random& random, std::int64_t most = 8192) {
  Sizes sizes{};
  sizes.codebook = random.one_in(3)
                       ? random.pick({2,   3,   15,  16,  17,   31,   32,   33,   63,   64,  65,
                                      128, 255, 256, 257, 1000, 1024, 1025, 4096, 8191, 8192})
                   : random.one_in(2) ? random.between(2, 141)
                                      : random.size(2, 8192);
  sizes.codebook = std::min(sizes.codebook, most);
  int least = 8;
  while ((INT64_C(1) << least) < 2 * sizes.codebook) ++least;
  sizes.prob_bits = static_cast<int>(random.pick({least, 20, random.between(least, 20)}));
  return sizes;
}

}  // namespace percov2_test
