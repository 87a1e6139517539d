// Rows of logits of every type the coder takes, beside the int16 numbers that they stand for.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "coder/intervals.h"
#include "plain_coder.h"
#include "random_input.h"

namespace percov2_test {

inline float random_float(Random& random) {
  return static_cast<float>(random.between(-(1 << 24), 1 << 24)) / static_cast<float>(1 << 24);
}

// One row of natural logarithms: a kernel may find the ties, the ends and the infinities hard.
inline void fill_floats(Random& random, float* logits, std::int64_t count) {
  constexpr float kLargest = std::numeric_limits<float>::max();
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const std::int64_t kind = random.between(0, 6);
  constexpr float kScales[] = {1e-40f, 1e-3f, 1.0f, 8.0f, 100.0f, 1e6f, 1e38f};
  const float scale = kScales[random.between(0, 6)];
  for (std::int64_t i = 0; i < count; ++i) {
    switch (kind) {
      case 0:  // near ties: halves of a step below 0
        logits[i] = -(static_cast<float>(random.between(0, 70000)) / 2) / 369.32993f;
        break;
      case 1:  // flat
        logits[i] = scale;
        break;
      case 2:  // ends
        logits[i] = random.one_in(2) ? kLargest : -kLargest;
        break;
      default:
        logits[i] = random_float(random) * scale;
    }
    if (kind == 5 && random.one_in(3)) logits[i] = -kInfinity;
    if (kind == 6 && random.one_in(3)) logits[i] = -0.0f;
  }
  if (kind == 0) logits[random.between(0, count - 1)] = 0;
  logits[random.between(0, count - 1)] = kind == 2 ? kLargest : random_float(random) * scale;
}

class RandomLogits {
 public:
  // [rows, codebook]; `broken`: some row may hold a NaN, +inf or nothing finite.
  RandomLogits(Random& random, std::int64_t rows, std::int64_t codebook, bool broken = false)
      : type_(static_cast<percov2::LogitType>(random.one_in(2) ? 0 : random.between(1, 2))),
        codebook_(codebook),
        words_(type_ == percov2::LogitType::kFloat32 ? 0 : rows * codebook, random.one_in(3)),
        floats_(type_ == percov2::LogitType::kFloat32 ? rows * codebook : 0, random.one_in(3)) {
    std::vector<float> line(static_cast<std::size_t>(codebook));
    for (std::int64_t r = 0; r < rows; ++r) {
      if (type_ == percov2::LogitType::kInt16) {
        fill_logits(random, words_.data() + r * codebook, codebook);
        rounded_.insert(rounded_.end(), words_.data() + r * codebook,
                        words_.data() + (r + 1) * codebook);
        continue;
      }
      fill_floats(random, line.data(), codebook);
      if (broken && random.one_in(2)) spoil(random, line);
      for (std::int64_t i = 0; i < codebook; ++i) {
        float& x = line[static_cast<std::size_t>(i)];
        if (type_ == percov2::LogitType::kFloat32) {
          floats_[r * codebook + i] = x;
          continue;
        }
        std::uint32_t bits;
        std::memcpy(&bits, &x, sizeof bits);
        bits &= 0xFFFF0000u;  // what bfloat16 keeps; of a NaN, its quiet bit
        words_[r * codebook + i] = static_cast<std::int16_t>(bits >> 16);
        std::memcpy(&x, &bits, sizeof bits);
      }
      const auto numbers = plain::round_logits(line.data(), codebook);
      valid_ = valid_ && !numbers.empty();
      rounded_.insert(rounded_.end(), numbers.begin(), numbers.end());
      rounded_.resize(static_cast<std::size_t>((r + 1) * codebook));
    }
  }

  percov2::Logits view() const {
    const bool is_float = type_ == percov2::LogitType::kFloat32;
    return {is_float ? static_cast<const void*>(floats_.data()) : words_.data(), type_, codebook_};
  }
  // The int16 logits of a row.
  const std::int16_t* line(std::int64_t row) const { return rounded_.data() + row * codebook_; }
  // Whether all rows are.
  bool valid() const { return valid_; }

 private:
  static void spoil(Random& random, std::vector<float>& line) {
    const auto at =
        static_cast<std::size_t>(random.between(0, static_cast<std::int64_t>(line.size()) - 1));
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    switch (random.between(0, 2)) {
      case 0:
        line[at] = std::numeric_limits<float>::quiet_NaN();
        break;
      case 1:
        line[at] = kInfinity;
        break;
      default:
        for (float& x : line) x = -kInfinity;
    }
  }

  percov2::LogitType type_;
  std::int64_t codebook_;
  bool valid_ = true;
  Fenced<std::int16_t> words_;
  Fenced<float> floats_;
  std::vector<std::int16_t> rounded_;
};

}  // namespace percov2_test
