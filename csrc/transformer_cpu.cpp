// Attention and layers of the integer token transformer.

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

#include "attention.h"
#include "parallel.h"
#include "transformer.h"

namespace percov2 {
namespace {

constexpr std::int64_t kTileRows = 16;
constexpr std::int64_t kTileColumns = 32;
constexpr std::int64_t kRowsAtOnce = 64;
constexpr std::int32_t kResidualLimit = 1 << 20;

// Readers whose windows overlap: picks[first .. last).
struct Tile {
  std::int64_t first;
  std::int64_t last;
};

std::vector<std::int32_t> widen(const std::int16_t* values, std::int64_t count) {
  return std::vector<std::int32_t>(values, values + count);
}

// Throws std::invalid_argument unless every entry is a start entry (row and column -1) or has a
// position, and a stage that can come: far-off positions would ask for boundless memory, and the
// largest int32 marks positions without a key.
void check_entries(const EntryView& entries, const char* name) {
  for (std::int64_t i = 0; i < entries.count; ++i) {
    const std::int32_t row = entries.row[i], column = entries.column[i], stage = entries.stage[i];
    const bool start = row == -1 && column == -1;
    const bool placed = row >= 0 && row < kMaxSide && column >= 0 && column < kMaxSide;
    if ((start || placed) && stage >= 0 && stage < std::numeric_limits<std::int32_t>::max()) {
      continue;
    }
    throw std::invalid_argument(
        std::string(name) + " " + std::to_string(i) + " has row " + std::to_string(row) +
        ", column " + std::to_string(column) + ", stage " + std::to_string(stage) +
        "; it must be a start entry (-1, -1) or lie in a grid of at most " +
        std::to_string(kMaxSide) + " rows and columns, with a stage >= 0 below 2^31 - 1");
  }
}

void add_saturated(std::int32_t* residual, const std::int32_t* update, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    residual[i] = std::min(std::max(residual[i] + update[i], -kResidualLimit), kResidualLimit);
  }
}

}  // namespace

IntegerLayer::IntegerLayer(const LayerParameters& p)
    : dim_(p.dim),
      heads_(p.heads),
      head_dim_(p.head_dim),
      gain_bits_(p.gain_bits),
      attention_gain_(widen(p.attention_gain, p.dim)),
      mlp_gain_(widen(p.mlp_gain, p.dim)),
      gelu_(p.gelu, p.gelu + 256),
      q_(p.q, -127, 127),
      kv_(p.kv, -127, 127),
      out_(p.out, -kResidualLimit, kResidualLimit),
      up_(p.up, -127, 127),
      down_(p.down, -kResidualLimit, kResidualLimit) {
  if (head_dim_ < 1 || head_dim_ > kMaxHeadDim || gain_bits_ < 0 || gain_bits_ > 5) {
    throw std::invalid_argument("head_dim or gain_bits of the entropy model is out of range");
  }
  for (std::int64_t h = 0; h < heads_; ++h) {
    const std::int16_t* bias = p.score_bias + h * (kWindow * kWindow + kStartEntries);
    for (std::int64_t dy = 0; dy < kWindow; ++dy) {
      window_bias_.insert(window_bias_.end(), bias + dy * kWindow, bias + (dy + 1) * kWindow);
      window_bias_.push_back(2 * kHidden);  // the padding of a line is outside the window
    }
    start_bias_.insert(start_bias_.end(), bias + kWindow * kWindow,
                       bias + kWindow * kWindow + kStartEntries);
    if (p.score_shift[h] < 1 || p.score_shift[h] > 12) {
      throw std::invalid_argument("a score shift of the entropy model is out of range");
    }
    score_shift_.push_back(p.score_shift[h]);
  }
}

void IntegerLayer::keys_values(const std::int32_t* residual, std::int64_t rows, int threads,
                               std::int8_t* k, std::int8_t* v) const {
  const std::int64_t width = inner();
  parallel_ranges(
      (rows + kRowsAtOnce - 1) / kRowsAtOnce, threads, [&](std::int64_t first, std::int64_t last) {
        std::vector<float> x(static_cast<std::size_t>(kRowsAtOnce * dim_));
        std::vector<std::int32_t> y(static_cast<std::size_t>(kRowsAtOnce * 2 * width));
        for (std::int64_t row = first * kRowsAtOnce; row < std::min(rows, last * kRowsAtOnce);
             row += kRowsAtOnce) {
          const std::int64_t count = std::min(kRowsAtOnce, rows - row);
          layer_norm(residual + row * dim_, attention_gain_.data(), count, dim_, x.data());
          kv_.run(x.data(), count, y.data());
          for (std::int64_t r = 0; r < count; ++r) {
            for (std::int64_t c = 0; c < width; ++c) {
              k[(row + r) * width + c] = static_cast<std::int8_t>(y[r * 2 * width + c]);
              v[(row + r) * width + c] = static_cast<std::int8_t>(y[(r * 2 + 1) * width + c]);
            }
          }
        }
      });
}

// What one thread needs to advance tiles.
struct IntegerLayer::Workspace {
  Box box;
  std::vector<float> x;         // [picks, dim or hidden]
  std::vector<std::int32_t> y;  // [picks, inner, dim or hidden]
  std::vector<float> q;         // [picks, inner]
  std::vector<float> mean;      // [picks, inner]
};

void IntegerLayer::attend_tile(Workspace& w, const EntryView& readers, const std::int64_t* picks,
                               std::int64_t count, const std::int8_t* k,
                               const std::int8_t* v) const {
  for (std::int64_t h = 0; h < heads_; ++h) {
    const std::int64_t at = h * head_dim_;
    w.box.load(k + at, v + at, inner());
    const ScoreParameters scores{window_bias_.data() + h * kWindow * kLine,
                                 start_bias_.data() + h * kStartEntries,
                                 score_shift_[static_cast<std::size_t>(h)], gain_bits_};
    for (std::int64_t n = 0; n < count; ++n) {
      attend(w.box, scores, readers.row[picks[n]], readers.column[picks[n]],
             readers.stage[picks[n]], w.q.data() + n * inner() + at,
             w.mean.data() + n * inner() + at);
    }
  }
}

void IntegerLayer::advance_tile(Workspace& w, std::int32_t* residual, const EntryView& readers,
                                const std::int64_t* picks, std::int64_t count, const std::int8_t* k,
                                const std::int8_t* v, const EntryView& keys) const {
  const auto grow = [](auto& values, std::int64_t size) {
    if (static_cast<std::int64_t>(values.size()) < size) {
      values.resize(static_cast<std::size_t>(size));
    }
  };
  const std::int64_t hidden = up_.outputs();
  const std::int64_t widest = std::max({dim_, inner(), hidden});
  grow(w.x, kRowsAtOnce * widest);
  grow(w.y, kRowsAtOnce * widest);
  grow(w.q, count * inner());
  grow(w.mean, count * inner());
  std::vector<std::int32_t> rows(static_cast<std::size_t>(kRowsAtOnce * dim_));

  std::int64_t top = readers.row[picks[0]], bottom = top;
  std::int64_t left = readers.column[picks[0]], right = left;
  for (std::int64_t n = 0; n < count; ++n) {
    top = std::min<std::int64_t>(top, readers.row[picks[n]]);
    bottom = std::max<std::int64_t>(bottom, readers.row[picks[n]]);
    left = std::min<std::int64_t>(left, readers.column[picks[n]]);
    right = std::max<std::int64_t>(right, readers.column[picks[n]]);
  }
  // Start entries read start entries only: no grid around them.
  const EntryView nobody{nullptr, nullptr, nullptr, 0};
  w.box.place(top, left, bottom - top + 1, right - left + 1, head_dim_, top < 0 ? nobody : keys);

  for (std::int64_t first = 0; first < count; first += kRowsAtOnce) {
    const std::int64_t some = std::min(kRowsAtOnce, count - first);
    for (std::int64_t n = 0; n < some; ++n) {
      std::copy_n(residual + picks[first + n] * dim_, dim_, rows.data() + n * dim_);
    }
    layer_norm(rows.data(), attention_gain_.data(), some, dim_, w.x.data());
    q_.run(w.x.data(), some, w.y.data());
    std::copy_n(w.y.data(), some * inner(), w.q.data() + first * inner());
  }
  attend_tile(w, readers, picks, count, k, v);
  for (std::int64_t first = 0; first < count; first += kRowsAtOnce) {
    const std::int64_t some = std::min(kRowsAtOnce, count - first);
    for (std::int64_t n = 0; n < some; ++n) {
      std::copy_n(residual + picks[first + n] * dim_, dim_, rows.data() + n * dim_);
    }
    out_.run(w.mean.data() + first * inner(), some, w.y.data());
    add_saturated(rows.data(), w.y.data(), some * dim_);
    layer_norm(rows.data(), mlp_gain_.data(), some, dim_, w.x.data());
    up_.run(w.x.data(), some, w.y.data());
    for (std::int64_t i = 0; i < some * hidden; ++i) {
      w.x[static_cast<std::size_t>(i)] =
          gelu_[static_cast<std::size_t>(w.y[static_cast<std::size_t>(i)] + 128)];
    }
    down_.run(w.x.data(), some, w.y.data());
    add_saturated(rows.data(), w.y.data(), some * dim_);
    for (std::int64_t n = 0; n < some; ++n) {
      std::copy_n(rows.data() + n * dim_, dim_, residual + picks[first + n] * dim_);
    }
  }
}

void IntegerLayer::advance(std::int32_t* residual, std::int64_t batch, const EntryView& readers,
                           const std::int8_t* k, const std::int8_t* v, std::int64_t key_stride,
                           const EntryView& keys, int threads) const {
  check_entries(readers, "reader");
  check_entries(keys, "key");
  for (std::int64_t j = 0; j < std::max(keys.count, kStartEntries); ++j) {
    if (j >= keys.count || (keys.row[j] < 0) != (j < kStartEntries)) {
      throw std::invalid_argument("the first three keys, and no others, must be start entries");
    }
  }
  // Readers by tile, in their order inside a tile; start entries before all others.
  std::vector<std::pair<std::int64_t, std::int64_t>> placed;
  for (std::int64_t i = 0; i < readers.count; ++i) {
    const std::int64_t band = readers.row[i] < 0 ? -1 : readers.row[i] / kTileRows;
    const std::int64_t place = readers.row[i] < 0 ? 0 : readers.column[i] / kTileColumns;
    placed.emplace_back(band * (std::int64_t{1} << 31) + place, i);
  }
  std::sort(placed.begin(), placed.end());
  std::vector<std::int64_t> picks;
  std::vector<Tile> tiles;
  for (std::size_t i = 0; i < placed.size(); ++i) {
    picks.push_back(placed[i].second);
    const auto next = static_cast<std::int64_t>(i) + 1;
    if (i == 0 || placed[i].first != placed[i - 1].first) tiles.push_back({next - 1, next});
    tiles.back().last = next;
  }
  const auto per_image = static_cast<std::int64_t>(tiles.size());
  std::atomic<std::int64_t> next{0};
  const std::int64_t units = batch * per_image;
  // One range per worker; the tiles themselves are handed out one by one, for they differ in size.
  parallel_ranges(std::min<std::int64_t>(threads, units), threads, [&](auto, auto) {
    Workspace workspace;
    for (std::int64_t unit = next++; unit < units; unit = next++) {
      const std::int64_t image = unit / per_image;
      const Tile& tile = tiles[static_cast<std::size_t>(unit % per_image)];
      const std::int64_t offset = image * key_stride * inner();
      advance_tile(workspace, residual + image * readers.count * dim_, readers,
                   picks.data() + tile.first, tile.last - tile.first, k + offset, v + offset, keys);
    }
  });
}

IntegerHead::IntegerHead(std::int64_t dim, const std::int16_t* gain, const LinearParameters& p)
    : dim_(dim), gain_(widen(gain, dim)), linear_(p, -32768, 32767) {}

void IntegerHead::logits(const std::int32_t* residual, std::int64_t rows, int threads,
                         std::int16_t* out) const {
  const std::int64_t width = linear_.outputs();
  parallel_ranges(
      (rows + kRowsAtOnce - 1) / kRowsAtOnce, threads, [&](std::int64_t first, std::int64_t last) {
        std::vector<float> x(static_cast<std::size_t>(kRowsAtOnce * dim_));
        std::vector<std::int32_t> y(static_cast<std::size_t>(kRowsAtOnce * width));
        for (std::int64_t row = first * kRowsAtOnce; row < std::min(rows, last * kRowsAtOnce);
             row += kRowsAtOnce) {
          const std::int64_t count = std::min(kRowsAtOnce, rows - row);
          layer_norm(residual + row * dim_, gain_.data(), count, dim_, x.data());
          linear_.run(x.data(), count, y.data());
          for (std::int64_t i = 0; i < count * width; ++i) {
            out[row * width + i] = static_cast<std::int16_t>(y[static_cast<std::size_t>(i)]);
          }
        }
      });
}

}  // namespace percov2
