// The layout of entries in space and stages, and of their keys and values.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "support/aligned_array.h"
#include "transformer/attention_kernels.h"

namespace percov2 {

// A grid of tokens and its schedule: the coding order, and what each entry may see.
class StageGrid {
 public:
  // stages [height, width], 1 .. S. Throws std::invalid_argument for a stage below 1 or an empty
  // grid.
  StageGrid(const std::int32_t* stages, std::int64_t height, std::int64_t width);

  std::int64_t height() const { return height_; }
  std::int64_t width() const { return width_; }
  std::int64_t rows() const { return rows_; }        // padded
  std::int64_t columns() const { return columns_; }  // padded
  std::int64_t positions() const { return height_ * width_; }
  // Raster positions in coding order: by stage, raster order inside a stage.
  const std::vector<std::int32_t>& order() const { return order_; }
  // The end of stage g in `order`: ends[g]; ends[0] = 0.
  const std::vector<std::int64_t>& ends() const { return ends_; }
  std::int64_t stages() const { return static_cast<std::int64_t>(ends_.size()) - 1; }
  const std::int32_t* stage() const { return stage_.data(); }
  const std::int32_t* first_stage() const { return first_stage_.data(); }
  // The sight of the content (or, one stage earlier, of the query) at a raster position. Its cells
  // contain the windows of this position and of a partner (`paired`), or of this position alone.
  Sight content_sight(std::int32_t position, std::int32_t partner) const;
  Sight query_sight(std::int32_t position, std::int32_t partner) const;
  Sight content_sight(std::int32_t position) const { return content_sight(position, position); }
  Sight query_sight(std::int32_t position) const { return query_sight(position, position); }
  // Pairs of entries whose windows fit into one sight, by raster position. An entry is a position
  // and a number; it is its own partner if it finds none.
  using Entry = std::pair<std::int32_t, std::int64_t>;
  std::vector<std::pair<Entry, Entry>> paired(std::vector<Entry> entries) const;
  static Sight start_sight() { return {0, 0, 0, 0, 0, 0}; }

 private:
  std::int64_t height_, width_, rows_, columns_;
  std::vector<std::int32_t> order_;
  std::vector<std::int64_t> ends_;
  std::vector<std::int32_t> stage_;        // [rows, columns], the largest int32: no key
  std::vector<std::int32_t> first_stage_;  // [rows / 4]
};

// The memory layout of keys and values of one image and one layer.
class KeyLayout {
 public:
  KeyLayout(const StageGrid& grid, std::int64_t heads, std::int64_t head_dim);
  // Bytes of one image and one layer, a multiple of 64.
  std::int64_t bytes() const { return heads_ * head_bytes(); }
  HeadKeys head(const StageGrid& grid, const std::int8_t* memory, std::int64_t h) const;
  // Writes the key and value of all heads, kv [2, heads * head_dim], of a raster position or, for
  // `position` < 0, of start entry -1 - position.
  void store(const StageGrid& grid, std::int64_t position, const std::int8_t* kv,
             std::int8_t* memory) const;

 private:
  std::int64_t head_bytes() const { return key_bytes_ + value_bytes_ + sum_bytes_; }

  std::int64_t heads_, head_dim_, quads_, value_blocks_;
  std::int64_t key_bytes_, value_bytes_, sum_bytes_;
};

// The biases of heads in the layout of the kernels.
class ScoreTables {
 public:
  // bias [heads, 964], shift [heads]. Throws std::invalid_argument for values out of range.
  ScoreTables(const std::int16_t* bias, const std::int8_t* shift, int gain_bits,
              std::int64_t heads);
  HeadScores head(std::int64_t h) const;

 private:
  int gain_bits_;
  std::vector<std::int32_t> shift_;
  AlignedArray<std::int32_t> window_;  // [heads, 41, 64]
  AlignedArray<std::int32_t> start_;   // [heads, 16]
};

}  // namespace percov2
