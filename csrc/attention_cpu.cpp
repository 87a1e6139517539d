#include <algorithm>
#include <cstddef>
#include <cstring>
#include <iterator>
#include <limits>

#include "attention.h"
#include "clones.h"

namespace percov2 {
namespace {

constexpr std::int32_t kNever = std::numeric_limits<std::int32_t>::max();
constexpr std::int64_t kLanes = 4;
constexpr std::int64_t kParts = kLine / kLanes;

// floor(126.61 * 2^(-d / 16) + 1/2) for d = 0 .. 127, then 0.
constexpr float kWeights[129] = {
    127, 121, 116, 111, 106, 102, 98, 93, 90, 86, 82, 79, 75, 72, 69, 66, 63, 61, 58, 56, 53, 51,
    49,  47,  45,  43,  41,  39,  38, 36, 35, 33, 32, 30, 29, 28, 27, 25, 24, 23, 22, 21, 21, 20,
    19,  18,  17,  17,  16,  15,  15, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9,  9,  9,  8,  8,  8,
    7,   7,   7,   6,   6,   6,   6,  5,  5,  5,  5,  5,  4,  4,  4,  4,  4,  3,  3,  3,  3,  3,
    3,   3,   3,   2,   2,   2,   2,  2,  2,  2,  2,  2,  2,  2,  2,  1,  1,  1,  1,  1,  1,  1,
    1,   1,   1,   1,   1,   1,   1,  1,  1,  1,  1,  1,  1,  1,  1,  1,  1,  1,  0};

// Four numbers fit a register of every instruction set. GCC 12 splits longer vectors badly where
// registers are shorter. Of a layer's time, 8 lanes save 16 % on AVX2 but cost a factor of 2.8 on
// the baseline; 16 lanes save 14 % on AVX-512 but cost a factor of 5 on AVX2.
using Floats = float __attribute__((vector_size(16)));
using Integers = std::int32_t __attribute__((vector_size(16)));

PERCOV2_INLINE void load(Floats& to, const float* from) { std::memcpy(&to, from, sizeof to); }
PERCOV2_INLINE void load(Integers& to, const std::int32_t* from) {
  std::memcpy(&to, from, sizeof to);
}
PERCOV2_INLINE void keep_larger(Integers& best, const Integers& other) {
  best = best > other ? best : other;
}

// Weights of scores `distance` sixteenths of an octave below the maximum, in place:
// floor(126.61 * 2^(-d / 16) + 1/2). A polynomial gives 126.61 * 2^-f for f = (d mod 16) / 16 with
// an error below 0.0003, and 126.61 * 2^(-d/16) is nowhere nearer than 0.005 to a half: the integer
// is that of the definition for every d (a test compares them all).
PERCOV2_INLINE void weigh(Integers& distance, Floats& weight) {
  const Integers most = Integers{} + 255;
  distance = distance < most ? distance : most;
  const Floats f = __builtin_convertvector(distance & 15, Floats) * 0.0625f;
  Floats p = f * 0.87492317f - 6.7510433f;
  p = p * f + 30.319485f;
  p = p * f - 87.747246f;
  p = p * f + 126.60975f;
  const Integers bits = (127 - (distance >> 4)) << 23;  // 2^-(d div 16) as a float
  Floats scale;
  std::memcpy(&scale, &bits, sizeof scale);
  weight = __builtin_convertvector(__builtin_convertvector(p * scale + 0.5f, Integers), Floats);
}

// What one reader and one head need. Lines are rows of the window.
struct Window {
  const float* key;                 // at the window's first cell; null: no window
  const float* value;               // at the same cell
  std::int64_t plane;               // from one dimension of a key to the next
  std::int64_t stride;              // from one line to the next, in cells
  const std::int32_t* stage;        // at the window's first cell
  const std::int32_t* first_stage;  // at the window's first line
  std::int32_t reads;
  const std::int32_t* start_score;  // [3]
  const float* start_value;         // [3, 16 * blocks]
};

// Sum of weight * value, [16 * blocks], and the sum of weights. Every partial sum is an integer
// below 2^24, so their order does not matter.
template <int blocks>
PERCOV2_INLINE void attend_window(const Window& w, const ScoreParameters& scores,
                                  std::int64_t head_dim, const float* q, float* sum,
                                  std::int32_t* total) {
  Integers score[kWindow][kParts];
  std::int64_t used[kWindow];
  std::int32_t line_best[kWindow];
  std::int64_t lines = 0;
  std::int32_t best = kHidden;
  for (std::int64_t s = 0; s < kStartEntries; ++s) best = std::max(best, w.start_score[s]);
  const std::int32_t half = 1 << (scores.shift - 1);
  for (std::int64_t dy = 0; dy < kWindow && w.key != nullptr; ++dy) {
    if (w.first_stage[dy] > w.reads) continue;  // no visible key in this row of the box
    Floats dot[kParts] = {};
    for (std::int64_t c = 0; c < head_dim; ++c) {
      const float* line = w.key + c * w.plane + dy * w.stride;
      for (std::int64_t part = 0; part < kParts; ++part) {
        Floats k;
        load(k, line + part * kLanes);
        dot[part] += q[c] * k;
      }
    }
    Integers top = Integers{} + kHidden;
    for (std::int64_t part = 0; part < kParts; ++part) {
      Integers when, add;
      load(when, w.stage + dy * w.stride + part * kLanes);
      load(add, scores.window + dy * kLine + part * kLanes);
      const Integers exact =
          ((__builtin_convertvector(dot[part], Integers) + half) >> scores.shift) + add;
      score[lines][part] = when <= w.reads ? exact : Integers{} + kHidden;
      keep_larger(top, score[lines][part]);
    }
    std::int32_t line = kHidden;
    for (std::int64_t i = 0; i < kLanes; ++i) line = std::max(line, top[i]);
    best = std::max(best, line);
    line_best[lines] = line;
    used[lines++] = dy;
  }

  constexpr std::int64_t vectors = blocks * 16 / kLanes;
  Floats mean[2][vectors] = {};  // two sums, so that one can be added to while the other settles
  Floats weight_sum = {};
  for (std::int64_t s = 0; s < kStartEntries; ++s) {
    const float weight = kWeights[std::min(best - w.start_score[s], 128)];
    weight_sum[s] += weight;
    for (std::int64_t b = 0; b < vectors; ++b) {
      Floats v;
      load(v, w.start_value + (s * vectors + b) * kLanes);
      mean[0][b] += weight * v;
    }
  }
  for (std::int64_t n = 0; n < lines; ++n) {
    if (best - line_best[n] >= 128) continue;  // every weight is 0
    float weight[kLine];
    for (std::int64_t part = 0; part < kParts; ++part) {
      Floats wide;
      Integers distance = best - score[n][part];
      weigh(distance, wide);
      weight_sum += wide;
      std::memcpy(weight + part * kLanes, &wide, sizeof wide);
    }
    const float* value = w.value + used[n] * w.stride * vectors * kLanes;
    for (std::int64_t j = 0; j < kLine; j += 2) {
      for (std::int64_t b = 0; b < vectors; ++b) {
        Floats even, odd;
        load(even, value + (j * vectors + b) * kLanes);
        load(odd, value + ((j + 1) * vectors + b) * kLanes);
        mean[0][b] += weight[j] * even;
        mean[1][b] += weight[j + 1] * odd;
      }
    }
  }
  float all = 0;
  for (std::int64_t i = 0; i < kLanes; ++i) all += weight_sum[i];
  *total = static_cast<std::int32_t>(all);
  for (std::int64_t b = 0; b < vectors; ++b) {
    const Floats both = mean[0][b] + mean[1][b];
    std::memcpy(sum + b * kLanes, &both, sizeof both);
  }
}

#define PERCOV2_ATTEND(BLOCKS)                                                                    \
  PERCOV2_VECTOR_CLONES void attend_##BLOCKS(const Window& window, const ScoreParameters& scores, \
                                             std::int64_t head_dim, const float* q, float* sum,   \
                                             std::int32_t* total) {                               \
    attend_window<BLOCKS>(window, scores, head_dim, q, sum, total);                               \
  }
PERCOV2_ATTEND(1)
PERCOV2_ATTEND(2)
PERCOV2_ATTEND(3)
PERCOV2_ATTEND(4)
#undef PERCOV2_ATTEND

std::int8_t rounded_mean(float weighted, std::int32_t total, int gain_bits) {
  // |weighted| <= 127 * total and total <= 1040 * 127: the numerator is in [0, 2^31).
  const std::int64_t numerator =
      static_cast<std::int64_t>(weighted) * (std::int64_t{1} << gain_bits) +
      (static_cast<std::int64_t>(total) << (7 + gain_bits)) + total / 2;
  const auto quotient = static_cast<std::uint32_t>(numerator) / static_cast<std::uint32_t>(total);
  const std::int32_t mean = static_cast<std::int32_t>(quotient) - (128 << gain_bits);
  return static_cast<std::int8_t>(std::min(std::max(mean, -127), 127));
}

}  // namespace

void attention_weights(const std::int32_t* distances, std::int64_t count, float* weights) {
  for (std::int64_t first = 0; first < count; first += kLanes) {
    const std::int64_t some = std::min(kLanes, count - first);
    Integers distance = {};
    std::copy_n(distances + first, some, reinterpret_cast<std::int32_t*>(&distance));
    Floats weight;
    weigh(distance, weight);
    std::copy_n(reinterpret_cast<const float*>(&weight), some, weights + first);
  }
}

void Box::place(std::int64_t row, std::int64_t column, std::int64_t high, std::int64_t wide,
                std::int64_t dims, const EntryView& keys) {
  head_dim = dims;
  top = row - kRadius;
  left = column - kRadius;
  rows = high + 2 * kRadius;
  stride = wide + 2 * kRadius + 2;  // a padded line may reach two columns further
  stage.assign(static_cast<std::size_t>(plane()), kNever);
  first_stage.assign(static_cast<std::size_t>(rows), kNever);
  // Cells without a key are multiplied too: they must hold numbers, and any number will do.
  key.assign(static_cast<std::size_t>(plane() * head_dim), 0);
  value.assign(static_cast<std::size_t>(plane() * padded() / 16), Line{});
  std::fill(std::begin(start_value), std::end(start_value), 0.0f);
  members.clear();
  cells.clear();
  for (std::int64_t j = 0; j < keys.count; ++j) {
    const std::int64_t y = keys.row[j] - top;
    const std::int64_t x = keys.column[j] - left;
    if (keys.row[j] < 0 || y < 0 || y >= rows || x < 0 || x >= stride) continue;
    members.push_back(j);
    cells.push_back(y * stride + x);
    stage[static_cast<std::size_t>(y * stride + x)] = keys.stage[j];
    std::int32_t& first = first_stage[static_cast<std::size_t>(y)];
    first = std::min(first, keys.stage[j]);
  }
}

void Box::load(const std::int8_t* k, const std::int8_t* v, std::int64_t inner) {
  for (std::int64_t s = 0; s < kStartEntries; ++s) {
    for (std::int64_t c = 0; c < head_dim; ++c) {
      start_key[s * head_dim + c] = k[s * inner + c];
      start_value[s * padded() + c] = v[s * inner + c];
    }
  }
  for (std::size_t n = 0; n < members.size(); ++n) {
    const std::int8_t* from_k = k + members[n] * inner;
    const std::int8_t* from_v = v + members[n] * inner;
    float* to_k = key.data() + cells[n];
    float* to_v = value_at(cells[n]);
    for (std::int64_t c = 0; c < head_dim; ++c) to_k[c * plane()] = from_k[c];
    for (std::int64_t c = 0; c < head_dim; ++c) to_v[c] = from_v[c];
  }
}

void attend(const Box& box, const ScoreParameters& scores, std::int32_t row, std::int32_t column,
            std::int32_t reads, const float* q, float* mean) {
  const std::int64_t dims = box.head_dim;
  std::int32_t start_score[kStartEntries];
  for (std::int64_t s = 0; s < kStartEntries; ++s) {
    float dot = 0;
    for (std::int64_t c = 0; c < dims; ++c) dot += q[c] * box.start_key[s * dims + c];
    const std::int32_t half = 1 << (scores.shift - 1);
    start_score[s] = ((static_cast<std::int32_t>(dot) + half) >> scores.shift) + scores.start[s];
  }
  std::int64_t line = 0;
  std::int64_t cell = 0;
  if (row >= 0) {
    line = row - kRadius - box.top;
    cell = line * box.stride + column - kRadius - box.left;
  }
  const Window window{row < 0 ? nullptr : box.key.data() + cell,
                      box.value_at(cell),
                      box.plane(),
                      box.stride,
                      box.stage.data() + cell,
                      box.first_stage.data() + line,
                      reads,
                      start_score,
                      box.start_value};
  float sum[kMaxHeadDim];
  std::int32_t total = 0;
  constexpr decltype(&attend_1) kAttend[] = {attend_1, attend_2, attend_3, attend_4};
  kAttend[box.padded() / 16 - 1](window, scores, dims, q, sum, &total);
  for (std::int64_t c = 0; c < dims; ++c) mean[c] = rounded_mean(sum[c], total, scores.gain_bits);
}

}  // namespace percov2
