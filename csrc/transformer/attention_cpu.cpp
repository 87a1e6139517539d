#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "support/isa.h"
#include "transformer/attention.h"

namespace percov2 {
namespace {

constexpr std::int32_t kNever = std::numeric_limits<std::int32_t>::max();
// Partners are at most this many rows apart, and one column.
constexpr std::int64_t kApart = 2;
// A sight extends the window by at most 3 rows above and below and 15 columns left and right, and
// by the rows and the column that only its partner reads. Biases in this margin are hidden.
constexpr std::int64_t kBiasTop = kCellRows - 1 + kApart;
constexpr std::int64_t kBiasLeft = 16;
constexpr std::int64_t kBiasRows = kWindow + 2 * kBiasTop;

constexpr std::int64_t padded(std::int64_t count, std::int64_t to) {
  return (count + to - 1) / to * to;
}

// Columns in memory. Rows of keys that are a power of two apart share cache sets, and a pass over
// 1024 columns took twice the time of one over 1040. An odd number of vectors avoids that.
constexpr std::int64_t padded_columns(std::int64_t width) {
  const std::int64_t columns = padded(width, kCellColumns);
  const bool even = columns / kCellColumns % 2 == 0;
  return even && columns >= 128 ? columns + kCellColumns : columns;
}

}  // namespace

const AttentionKernels& attention_kernels() {
#if defined(PERCOV2_X86_KERNELS)
  static constexpr const AttentionKernels* kTable[kIsaCount] = {
      &kAttentionScalar, &kAttentionAvx2, &kAttentionAvx512, &kAttentionScalar};
#elif defined(PERCOV2_NEON_KERNELS)
  static constexpr const AttentionKernels* kTable[kIsaCount] = {
      &kAttentionScalar, &kAttentionScalar, &kAttentionScalar, &kAttentionNeon};
#else
  static constexpr const AttentionKernels* kTable[kIsaCount] = {
      &kAttentionScalar, &kAttentionScalar, &kAttentionScalar, &kAttentionScalar};
#endif
  return *kTable[static_cast<int>(active_isa())];
}

StageGrid::StageGrid(const std::int32_t* stages, std::int64_t height, std::int64_t width)
    : height_(height),
      width_(width),
      rows_(padded(height, kCellRows)),
      columns_(padded_columns(width)) {
  if (height < 1 || width < 1 || height > (1 << 20) || width > (1 << 20)) {
    throw std::invalid_argument("a stage map must have 1 to 2^20 rows and columns");
  }
  const std::int64_t count = height * width;
  const auto last = *std::max_element(stages, stages + count);
  if (*std::min_element(stages, stages + count) < 1 || last > count) {
    throw std::invalid_argument("stages must be 1 .. S without gaps");
  }
  ends_.assign(static_cast<std::size_t>(last) + 1, 0);
  for (std::int64_t i = 0; i < count; ++i) ++ends_[static_cast<std::size_t>(stages[i])];
  if (std::find(ends_.begin() + 1, ends_.end(), 0) != ends_.end()) {
    throw std::invalid_argument("stages must be 1 .. S without gaps");
  }
  std::partial_sum(ends_.begin(), ends_.end(), ends_.begin());
  order_.resize(static_cast<std::size_t>(count));
  std::vector<std::int64_t> next(ends_.begin(), ends_.end() - 1);
  stage_.assign(static_cast<std::size_t>(rows_ * columns_), kNever);
  first_stage_.assign(static_cast<std::size_t>(rows_ / kCellRows), kNever);
  for (std::int64_t i = 0; i < count; ++i) {
    const auto at = static_cast<std::size_t>(next[static_cast<std::size_t>(stages[i] - 1)]++);
    order_[at] = static_cast<std::int32_t>(i);
    const std::int64_t row = i / width;
    stage_[static_cast<std::size_t>(row * columns_ + i % width)] = stages[i];
    std::int32_t& first = first_stage_[static_cast<std::size_t>(row / kCellRows)];
    first = std::min(first, stages[i]);
  }
}

Sight StageGrid::content_sight(std::int32_t position, std::int32_t partner) const {
  const std::int64_t row = position / width_, column = position % width_;
  const std::int64_t other_row = partner / width_, other_column = partner % width_;
  const std::int64_t top =
      std::max<std::int64_t>(0, std::min(row, other_row) - kRadius) / kCellRows * kCellRows;
  const std::int64_t bottom = std::min(height_ - 1, std::max(row, other_row) + kRadius);
  const std::int64_t left = std::max<std::int64_t>(0, std::min(column, other_column) - kRadius);
  const std::int64_t right = std::min(width_ - 1, std::max(column, other_column) + kRadius);
  // Aligned reads are faster, but may need one vector more.
  const std::int64_t vectors = (right - left) / kCellColumns + 1;
  const std::int64_t aligned = left / kCellColumns * kCellColumns;
  const std::int64_t first = right - aligned < vectors * kCellColumns ? aligned : left;
  Sight sight{};
  sight.reads = stage_[static_cast<std::size_t>(row * columns_ + column)];
  sight.first_row = static_cast<std::int32_t>(top);
  sight.groups = static_cast<std::int32_t>((bottom - top) / kCellRows + 1);
  sight.first_column = static_cast<std::int32_t>(first);
  sight.vectors = static_cast<std::int32_t>(vectors);
  sight.bias = static_cast<std::int32_t>((top - row + kRadius + kBiasTop) * kBiasStride + first -
                                         column + kRadius + kBiasLeft);
  return sight;
}

Sight StageGrid::query_sight(std::int32_t position, std::int32_t partner) const {
  Sight sight = content_sight(position, partner);
  --sight.reads;
  return sight;
}

std::vector<std::pair<StageGrid::Entry, StageGrid::Entry>> StageGrid::paired(
    std::vector<Entry> entries) const {
  std::sort(entries.begin(), entries.end());
  std::vector<bool> taken(entries.size());
  // The first entry without a partner at row + down, from column - 1 to column + 1; else i.
  const auto partner = [&](std::size_t i, std::int64_t down) {
    const std::int64_t row = entries[i].first / width_ + down, column = entries[i].first % width_;
    const std::int64_t begin = row * width_ + std::max<std::int64_t>(0, column - 1);
    const std::int64_t end = row * width_ + std::min(width_ - 1, column + 1);
    auto at = std::lower_bound(
        entries.begin() + static_cast<std::ptrdiff_t>(i) + 1, entries.end(), begin,
        [](const Entry& one, std::int64_t position) { return one.first < position; });
    for (; at != entries.end() && at->first <= end; ++at) {
      const auto j = static_cast<std::size_t>(at - entries.begin());
      if (!taken[j]) return j;
    }
    return i;
  };
  std::vector<std::pair<Entry, Entry>> pairs;
  for (std::size_t i = 0; i < entries.size(); ++i) {
    if (taken[i]) continue;
    std::size_t other = i;
    for (std::int64_t down = 0; down <= kApart && other == i; ++down) other = partner(i, down);
    taken[i] = taken[other] = true;
    pairs.emplace_back(entries[i], entries[other]);
  }
  return pairs;
}

KeyLayout::KeyLayout(const StageGrid& grid, std::int64_t heads, std::int64_t head_dim)
    : heads_(heads),
      head_dim_(head_dim),
      quads_((head_dim + kDimQuad - 1) / kDimQuad),
      value_blocks_((head_dim + 15) / 16) {
  if (head_dim < 1 || head_dim > kMaxHeadDim) {
    throw std::invalid_argument("head_dim of the entropy model is out of range");
  }
  const std::int64_t cells = grid.rows() * grid.columns();
  key_bytes_ = (cells + kCellColumns) * quads_ * kDimQuad;
  value_bytes_ = (cells + kCellRows) * value_blocks_ * 16;
  sum_bytes_ = (cells + kCellColumns) * static_cast<std::int64_t>(sizeof(std::int32_t));
}

HeadKeys KeyLayout::head(const StageGrid& grid, const std::int8_t* memory, std::int64_t h) const {
  const std::int8_t* key = memory + h * head_bytes();
  const std::int8_t* value = key + key_bytes_;
  const auto* sum = reinterpret_cast<const std::int32_t*>(value + value_bytes_);
  return {key,         value,          sum,       grid.stage(), grid.first_stage(),
          grid.rows(), grid.columns(), head_dim_, quads_,       value_blocks_};
}

void KeyLayout::store(const StageGrid& grid, std::int64_t position, const std::int8_t* kv,
                      std::int8_t* memory) const {
  const std::int64_t columns = grid.columns();
  const std::int64_t row = position < 0 ? grid.rows() : position / grid.width();
  const std::int64_t column = position < 0 ? -1 - position : position % grid.width();
  const std::int64_t plane = (position < 0 ? kCellColumns : columns) * kDimQuad;
  const std::int64_t key_at = row * quads_ * columns * kDimQuad + column * kDimQuad;
  const std::int64_t depth = value_blocks_ * 16 * kCellRows;
  const std::int64_t value_at =
      position < 0 ? row / kCellRows * columns * depth + column
                   : (row / kCellRows * columns + column) * depth + row % kCellRows;
  for (std::int64_t h = 0; h < heads_; ++h) {
    std::int8_t* key = memory + h * head_bytes();
    std::int8_t* value = key + key_bytes_ + value_at;
    auto* sum = reinterpret_cast<std::int32_t*>(key + key_bytes_ + value_bytes_);
    const std::int8_t* k = kv + h * head_dim_;
    const std::int8_t* v = k + heads_ * head_dim_;
    key += key_at;
    std::int32_t total = 0;
    for (std::int64_t c = 0; c < head_dim_; ++c) {
      key[c / kDimQuad * plane + c % kDimQuad] = k[c];
      value[c * kCellRows] = v[c];
      total += k[c];
    }
    sum[row * columns + column] = -128 * total;
  }
}

ScoreTables::ScoreTables(const std::int16_t* bias, const std::int8_t* shift, int gain_bits,
                         std::int64_t heads)
    : gain_bits_(gain_bits),
      window_(heads * kBiasRows * kBiasStride),
      start_(heads * kCellColumns) {
  if (gain_bits < 0 || gain_bits > 5) {
    throw std::invalid_argument("gain_bits of the entropy model is out of range");
  }
  std::fill_n(window_.data(), window_.size(), kHidden);
  std::fill_n(start_.data(), start_.size(), kHidden);
  for (std::int64_t h = 0; h < heads; ++h) {
    if (shift[h] < 5 || shift[h] > 12) {
      throw std::invalid_argument("a score shift of the entropy model is out of range");
    }
    shift_.push_back(shift[h]);
    const std::int16_t* from = bias + h * (kWindow * kWindow + kStartEntries);
    for (std::int64_t dy = 0; dy < kWindow; ++dy) {
      std::copy_n(from + dy * kWindow, kWindow,
                  window_.data() + (h * kBiasRows + kBiasTop + dy) * kBiasStride + kBiasLeft);
    }
    std::copy_n(from + kWindow * kWindow, kStartEntries, start_.data() + h * kCellColumns);
  }
}

HeadScores ScoreTables::head(std::int64_t h) const {
  return {window_.data() + h * kBiasRows * kBiasStride, start_.data() + h * kCellColumns,
          shift_[static_cast<std::size_t>(h)], gain_bits_};
}

}  // namespace percov2
