// Passes of the integer token transformer.

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "support/parallel.h"
#include "transformer/transformer.h"

namespace percov2 {
namespace {

constexpr std::int64_t kRowsAtOnce = 48;    // rows whose activations fit the first-level caches
constexpr std::int64_t kRowsOfChunk = 384;  // rows whose residuals fit the second-level cache
constexpr std::int64_t kSixteenths = 16;

// Class of a side of n tokens: 0 for 1, then one per doubling, at most 16.
std::int64_t size_class(std::int64_t n) {
  std::int64_t bits = 0;
  for (std::int64_t rest = n - 1; rest > 0; rest >>= 1) ++bits;
  return std::min<std::int64_t>(bits, 16);
}

std::int64_t checked_batch(std::int64_t batch) {
  if (batch >= 1) return batch;
  throw std::invalid_argument("batch is " + std::to_string(batch) + "; it must be at least 1");
}

}  // namespace

// A chunk of images that pass the layers together. Rows are the contents of all images, image after
// image, then their queries.
struct TokenPass::Chunk {
  const Entries& entries;
  const std::int32_t* tokens;  // of the first image
  std::int64_t images;
  KeyMemory keys;  // of the first image
  AlignedArray<std::int32_t> residual;
  AlignedArray<std::int8_t> q;     // [rows, inner]
  AlignedArray<std::int8_t> mean;  // [rows, inner]

  std::int64_t content_rows() const { return images * entries.contents; }
  std::int64_t rows() const { return images * entries.count(); }
  std::int64_t row_of(std::int64_t image, std::int64_t entry) const {
    return entry < entries.contents
               ? image * entries.contents + entry
               : content_rows() + image * entries.queries() + entry - entries.contents;
  }
  // The image of a row, and its entry.
  std::int64_t image_of(std::int64_t row) const {
    return row < content_rows() ? row / entries.contents
                                : (row - content_rows()) / entries.queries();
  }
  std::int64_t entry_of(std::int64_t row) const {
    return row < content_rows() ? row % entries.contents
                                : entries.contents + (row - content_rows()) % entries.queries();
  }
};

TokenPass::TokenPass(const IntegerTransformer& model, const std::int32_t* stages,
                     std::int64_t height, std::int64_t width)
    : model_(model),
      grid_(stages, height, width),
      layout_(grid_, model.heads(), model.head_dim()) {}

void TokenPass::add_starts(Entries& entries) const {
  for (std::int32_t s = 0; s < kStartEntries; ++s) entries.position.push_back(-1 - s);
  entries.contents += kStartEntries;
}

void TokenPass::add_contents(Entries& entries, std::int64_t first, std::int64_t last) const {
  add_queries(entries, first, last);
  entries.contents += last - first;
}

void TokenPass::add_queries(Entries& entries, std::int64_t first, std::int64_t last) const {
  const auto order = grid_.order().begin();
  entries.position.insert(entries.position.end(), order + first, order + last);
}

void TokenPass::plan(Entries& entries) const {
  const auto readings = [&](std::int64_t first) {
    std::vector<Reading> result;
    std::vector<StageGrid::Entry> placed;
    const auto take = [&](std::int64_t entry, std::int32_t position, std::int32_t partner) {
      const bool content = entry < entries.contents;
      result.push_back({entry, content ? grid_.content_sight(position, partner)
                                       : grid_.query_sight(position, partner)});
    };
    for (std::int64_t i = first; i < entries.count(); ++i) {
      const std::int32_t position = entries.position[static_cast<std::size_t>(i)];
      if (position < 0) {
        result.push_back({i, StageGrid::start_sight()});
      } else if (attention_kernels().pairs) {
        placed.emplace_back(position, i);
      } else {
        take(i, position, position);
      }
    }
    for (const auto& [one, other] : grid_.paired(std::move(placed))) {
      take(one.second, one.first, other.first);
      if (other.second != one.second) take(other.second, other.first, one.first);
    }
    return result;
  };
  entries.all = readings(0);
  entries.last = readings(entries.contents);
}

void TokenPass::embed(Chunk& chunk, std::int64_t first, std::int64_t last) const {
  const std::int64_t dim = model_.dim_;
  for (std::int64_t row = first; row < last; ++row) {
    const std::int64_t position =
        chunk.entries.position[static_cast<std::size_t>(chunk.entry_of(row))];
    std::int32_t* to = chunk.residual.data() + row * row_lanes(dim);
    if (position < 0) {
      const std::int64_t s = -1 - position;
      const std::int16_t* payload = model_.start_.data() + s * dim;
      const std::int16_t* size = s == 1 ? model_.height_.data() + size_class(grid_.height()) * dim
                                        : model_.width_.data() + size_class(grid_.width()) * dim;
      for (std::int64_t i = 0; i < dim; ++i) to[i] = payload[i] + (s == 0 ? 0 : size[i]);
      continue;
    }
    const std::int16_t* payload = model_.query_.data();
    if (row < chunk.content_rows()) {
      payload = model_.token_.data() +
                chunk.tokens[chunk.image_of(row) * grid_.positions() + position] * dim;
    }
    const std::int64_t y = position / grid_.width() * kSixteenths / grid_.height();
    const std::int64_t x = position % grid_.width() * kSixteenths / grid_.width();
    const std::int16_t* vertical = model_.row_.data() + y * dim;
    const std::int16_t* horizontal = model_.column_.data() + x * dim;
    for (std::int64_t i = 0; i < dim; ++i) to[i] = payload[i] + vertical[i] + horizontal[i];
  }
}

void TokenPass::project(Chunk& chunk, std::int64_t layer, std::int64_t first,
                        std::int64_t last) const {
  const IntegerTransformer::Layer& l = model_.layers_[static_cast<std::size_t>(layer)];
  const std::int64_t width = row_bytes(model_.dim_);
  const std::int64_t inner = row_bytes(model_.inner());
  AlignedArray<std::int8_t> x((last - first) * width);
  l.attention_gain.run(chunk.residual.data() + first * row_lanes(model_.dim_), last - first,
                       x.data());
  const std::int64_t contents = std::min(last, chunk.content_rows());
  if (contents > first) {
    const std::int64_t stride = row_bytes(2 * model_.inner());
    AlignedArray<std::int8_t> kv((contents - first) * stride);
    linear_kernels().to_bytes(l.kv.map(), x.data(), width, contents - first, kv.data(), stride);
    for (std::int64_t row = first; row < contents; ++row) {
      std::int8_t* memory = chunk.keys.base + chunk.image_of(row) * chunk.keys.image_stride +
                            layer * chunk.keys.layer_stride;
      layout_.store(grid_, chunk.entries.position[static_cast<std::size_t>(chunk.entry_of(row))],
                    kv.data() + (row - first) * stride, memory);
    }
  }
  const bool last_layer = layer + 1 == model_.layers();
  const std::int64_t reader = last_layer ? std::max(first, chunk.content_rows()) : first;
  if (reader < last) {
    linear_kernels().to_bytes(l.q.map(), x.data() + (reader - first) * width, width, last - reader,
                              chunk.q.data() + reader * inner, inner);
  }
}

void TokenPass::attend(Chunk& chunk, std::int64_t layer, int threads) const {
  const IntegerTransformer::Layer& l = model_.layers_[static_cast<std::size_t>(layer)];
  const std::int64_t inner = row_bytes(model_.inner());
  const bool last_layer = layer + 1 == model_.layers();
  const std::vector<Reading>& readings = last_layer ? chunk.entries.last : chunk.entries.all;
  const auto count = static_cast<std::int64_t>(readings.size());
  const std::int64_t splits = threads == 1 ? 1 : std::max<std::int64_t>(1, count / 32);
  parallel_pieces(chunk.images * model_.heads() * splits, threads, [&](std::int64_t piece) {
    const std::int64_t split = piece % splits;
    const std::int64_t h = piece / splits % model_.heads();
    const std::int64_t image = piece / splits / model_.heads();
    const HeadKeys keys = layout_.head(
        grid_, chunk.keys.base + image * chunk.keys.image_stride + layer * chunk.keys.layer_stride,
        h);
    std::vector<Reader> readers;
    for (std::int64_t i = count * split / splits; i < count * (split + 1) / splits; ++i) {
      const Reading& reading = readings[static_cast<std::size_t>(i)];
      const std::int64_t at = chunk.row_of(image, reading.entry) * inner + h * model_.head_dim();
      readers.push_back({reading.sight, chunk.q.data() + at, chunk.mean.data() + at});
    }
    attention_kernels().attend(keys, l.scores.head(h), readers.data(),
                               static_cast<std::int64_t>(readers.size()));
  });
}

void TokenPass::feed_forward(Chunk& chunk, std::int64_t layer, std::int64_t first,
                             std::int64_t last) const {
  const IntegerTransformer::Layer& l = model_.layers_[static_cast<std::size_t>(layer)];
  const LinearKernels& linear = linear_kernels();
  if (layer + 1 == model_.layers()) first = std::max(first, chunk.content_rows());
  const std::int64_t rows = last - first;
  if (rows <= 0) return;
  const std::int64_t lanes = row_lanes(model_.dim_);
  const std::int64_t width = row_bytes(model_.dim_);
  const std::int64_t inner = row_bytes(model_.inner());
  const std::int64_t hidden = row_bytes(l.up.outputs());
  std::int32_t* residual = chunk.residual.data() + first * lanes;
  AlignedArray<std::int8_t> x(rows * width);
  AlignedArray<std::int8_t> wide(rows * hidden);
  linear.add_to(l.out.map(), chunk.mean.data() + first * inner, inner, rows, residual, lanes);
  l.mlp_gain.run(residual, rows, x.data());
  linear.to_bytes(l.up.map(), x.data(), width, rows, wide.data(), hidden);
  norm_kernels().look_up(l.gelu.data(), wide.data(), rows * hidden);
  linear.add_to(l.down.map(), wide.data(), hidden, rows, residual, lanes);
}

void TokenPass::run_chunk(Chunk& chunk, int threads, std::int32_t* out) const {
  const std::int64_t rows = chunk.rows();
  const std::int64_t dim = model_.dim_;
  const std::int64_t lanes = row_lanes(dim);
  const std::int64_t inner = row_bytes(model_.inner());
  // A head may read a few bytes beyond its own.
  chunk.residual.grow(rows * lanes);
  chunk.q.grow(rows * inner + 64);
  chunk.mean.grow(rows * inner + 64);
  const std::int64_t share = (rows + threads - 1) / threads;
  const std::int64_t step = std::min(kRowsAtOnce, (share + 5) / 6 * 6);
  const std::int64_t blocks = (rows + step - 1) / step;
  for (std::int64_t layer = 0; layer <= model_.layers(); ++layer) {
    parallel_pieces(blocks, threads, [&](std::int64_t block) {
      const std::int64_t first = block * step, last = std::min(rows, first + step);
      if (layer == 0) {
        embed(chunk, first, last);
      } else {
        feed_forward(chunk, layer - 1, first, last);
      }
      if (layer < model_.layers()) {
        project(chunk, layer, first, last);
        return;
      }
      const std::int64_t contents = chunk.content_rows();
      for (std::int64_t row = std::max(first, contents); row < last; ++row) {
        std::copy_n(chunk.residual.data() + row * lanes, dim, out + (row - contents) * dim);
      }
    });
    if (layer < model_.layers()) attend(chunk, layer, threads);
  }
}

void TokenPass::run(const Entries& entries, const std::int32_t* tokens, std::int64_t batch,
                    const KeyMemory* cache, int threads, std::int32_t* out) const {
  if (threads < 1) {
    throw std::invalid_argument("threads is " + std::to_string(threads) + "; it must be >= 1");
  }
  const std::int64_t share = (batch + threads - 1) / threads;
  const std::int64_t images =
      std::max<std::int64_t>(1, std::min(share, kRowsOfChunk / entries.count()));
  const std::int64_t chunks = (batch + images - 1) / images;
  // Images are independent, so threads take whole chunks if that divides the work evenly.
  const bool apart = chunks / 4 >= threads || chunks % threads == 0;
  const std::int64_t workers = apart ? std::min<std::int64_t>(threads, chunks) : 1;
  std::atomic<std::int64_t> next{0};
  parallel_pieces(workers, threads, [&](std::int64_t) {
    AlignedArray<std::int8_t> own;
    if (cache == nullptr) own = AlignedArray<std::int8_t>(images * layout_.bytes());
    Chunk chunk{entries, nullptr, 0, {own.data(), layout_.bytes(), 0}, {}, {}, {}};
    for (std::int64_t i = next++; i < chunks; i = next++) {
      const std::int64_t first = i * images;
      chunk.images = std::min(images, batch - first);
      chunk.tokens = tokens + first * grid_.positions();
      if (cache != nullptr) {
        chunk.keys = *cache;
        chunk.keys.base += first * cache->image_stride;
      }
      run_chunk(chunk, apart ? 1 : threads, out + first * entries.queries() * model_.dim_);
    }
  });
}

void TokenPass::encode(const std::int32_t* tokens, std::int64_t batch, int threads,
                       std::int32_t* out) const {
  const std::vector<std::int32_t> own = checked_tokens(tokens, batch * grid_.positions());
  Entries entries;
  add_starts(entries);
  // No entry reads the contents of the last stage.
  add_contents(entries, 0, grid_.ends()[static_cast<std::size_t>(grid_.stages() - 1)]);
  add_queries(entries, 0, grid_.positions());
  plan(entries);
  run(entries, own.data(), batch, nullptr, threads, out);
}

std::vector<std::int32_t> TokenPass::checked_tokens(const std::int32_t* tokens,
                                                    std::int64_t count) const {
  std::vector<std::int32_t> own(tokens, tokens + count);
  for (const std::int32_t token : own) {
    if (token < 0 || token >= model_.codebook()) {
      throw std::invalid_argument("token " + std::to_string(token) + " is not in 0 .. " +
                                  std::to_string(model_.codebook() - 1));
    }
  }
  return own;
}

StagedPass::StagedPass(const IntegerTransformer& model, const std::int32_t* stages,
                       std::int64_t height, std::int64_t width, std::int64_t batch)
    : TokenPass(model, stages, height, width),
      batch_(checked_batch(batch)),
      tokens_(batch * grid_.positions()),
      cache_(batch * model.layers() * layout_.bytes()) {}

std::int64_t StagedPass::next_count() const {
  if (known_ == grid_.stages()) return 0;
  const auto g = static_cast<std::size_t>(known_);
  return grid_.ends()[g + 1] - grid_.ends()[g];
}

void StagedPass::decode(int threads, std::int32_t* out) {
  if (next_count() == 0) throw std::out_of_range("every stage is decoded; no logits remain");
  const auto g = static_cast<std::size_t>(known_);
  Entries entries;
  if (g == 0) {
    add_starts(entries);
  } else {
    add_contents(entries, grid_.ends()[g - 1], grid_.ends()[g]);
  }
  add_queries(entries, grid_.ends()[g], grid_.ends()[g + 1]);
  plan(entries);
  const KeyMemory cache{cache_.data(), model_.layers() * layout_.bytes(), layout_.bytes()};
  run(entries, tokens_.data(), batch_, &cache, threads, out);
}

void StagedPass::accept(const std::int32_t* tokens) {
  const std::int64_t count = next_count();
  if (count == 0) throw std::invalid_argument("every stage is decoded; no tokens are due");
  const std::vector<std::int32_t> own = checked_tokens(tokens, batch_ * count);
  const std::int32_t* position =
      grid_.order().data() + grid_.ends()[static_cast<std::size_t>(known_)];
  for (std::int64_t b = 0; b < batch_; ++b) {
    for (std::int64_t i = 0; i < count; ++i) {
      tokens_[b * grid_.positions() + position[i]] = own[static_cast<std::size_t>(b * count + i)];
    }
  }
  ++known_;
}

}  // namespace percov2
