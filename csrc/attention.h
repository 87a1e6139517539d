// Attention of the integer token transformer: one reader and one head against a window of keys.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "transformer.h"

namespace percov2 {

constexpr std::int64_t kRadius = 15;
constexpr std::int64_t kWindow = 2 * kRadius + 1;
constexpr std::int64_t kLine = 32;  // a row of the window, padded
constexpr std::int64_t kStartEntries = 3;
constexpr std::int64_t kMaxHeadDim = 64;
constexpr std::int32_t kHidden = -(1 << 20);

// Sixteen values that never straddle cache lines.
struct alignas(64) Line {
  float lane[16];
};

// Weights of scores that lie `distances` (>= 0) below the maximum, as `attend` computes them.
void attention_weights(const std::int32_t* distances, std::int64_t count, float* weights);

// Keys and values around some readers, placed on the grid; those of one head at a time, in float.
struct Box {
  std::int64_t head_dim = 0;
  std::int64_t top = 0;  // grid row of box row 0
  std::int64_t left = 0;
  std::int64_t rows = 0;
  std::int64_t stride = 0;                         // columns of the box
  std::vector<std::int64_t> members;               // keys inside, indices into the keys
  std::vector<std::int64_t> cells;                 // their cells in the box
  std::vector<std::int32_t> stage;                 // [rows, stride], the largest int32: no key
  std::vector<std::int32_t> first_stage;           // [rows], the earliest
  std::vector<float> key;                          // [head_dim, rows, stride]
  std::vector<Line> value;                         // [rows, stride, padded / 16]
  float start_key[kStartEntries * kMaxHeadDim];    // [3, head_dim]
  float start_value[kStartEntries * kMaxHeadDim];  // [3, padded]

  // Width of a value, a multiple of 16, zeros beyond head_dim.
  std::int64_t padded() const { return (head_dim + 15) / 16 * 16; }
  float* value_at(std::int64_t cell) { return value[at(cell)].lane; }
  const float* value_at(std::int64_t cell) const { return value[at(cell)].lane; }
  std::int64_t plane() const { return rows * stride; }
  // Covers the windows of readers in `high` x `wide` positions from (row, column) on.
  void place(std::int64_t row, std::int64_t column, std::int64_t high, std::int64_t wide,
             std::int64_t dims, const EntryView& keys);
  // Loads the keys and values of one head: k and v point to its part of the first key (start keys
  // are the first three), keys are `inner` apart.
  void load(const std::int8_t* k, const std::int8_t* v, std::int64_t inner);

 private:
  std::size_t at(std::int64_t cell) const { return static_cast<std::size_t>(cell * padded() / 16); }
};

// What a head adds to products of queries and keys.
struct ScoreParameters {
  const std::int32_t* window;  // [31, 32], hidden in the last column
  const std::int32_t* start;   // [3]
  std::int32_t shift;
  int gain_bits;
};

// Integer attention of one reader of a loaded box: q and mean [head_dim], integers of at most 127
// in magnitude. row < 0: a start entry, which sees start entries only.
void attend(const Box& box, const ScoreParameters& scores, std::int32_t row, std::int32_t column,
            std::int32_t reads, const float* q, float* mean);

}  // namespace percov2
