#include <algorithm>
#include <cstddef>
#include <stdexcept>

#include "support/parallel.h"
#include "transformer/transformer.h"

namespace percov2 {
namespace {

constexpr std::int64_t kSixteenths = 16;
constexpr std::int64_t kSizeClasses = 17;
constexpr std::int64_t kRowsAtOnce = 48;  // rows whose activations fit the first-level caches

std::vector<std::int16_t> table(const std::int16_t* values, std::int64_t count) {
  return std::vector<std::int16_t>(values, values + count);
}

}  // namespace

IntegerTransformer::Layer::Layer(const LayerParameters& p, std::int64_t dim, std::int64_t heads)
    : attention_gain(p.attention_gain, dim),
      q(p.q),
      kv(p.kv),
      scores(p.score_bias, p.score_shift, p.gain_bits, heads),
      out(p.out),
      mlp_gain(p.mlp_gain, dim),
      up(p.up),
      gelu(256),
      down(p.down) {
  for (int x = -128; x < 128; ++x) gelu[static_cast<std::uint8_t>(x)] = p.gelu[x + 128];
}

IntegerTransformer::IntegerTransformer(const TransformerParameters& p)
    : codebook_(p.codebook),
      dim_(p.dim),
      heads_(p.heads),
      head_dim_(p.head_dim),
      token_(table(p.token, p.codebook * p.dim)),
      query_(table(p.query, p.dim)),
      row_(table(p.row, kSixteenths * p.dim)),
      column_(table(p.column, kSixteenths * p.dim)),
      start_(table(p.start, kStartEntries * p.dim)),
      height_(table(p.height, kSizeClasses * p.dim)),
      width_(table(p.width, kSizeClasses * p.dim)),
      head_gain_(p.head_gain, p.dim),
      head_(p.head) {
  if (p.dim < 1 || p.dim > 1024 || p.head_dim < 1 || p.head_dim > kMaxHeadDim || p.heads < 1 ||
      p.layers.empty()) {
    throw std::invalid_argument("a size of the entropy model is out of range");
  }
  for (const LayerParameters& layer : p.layers) layers_.emplace_back(layer, p.dim, p.heads);
}

void IntegerTransformer::logits(const std::int32_t* residual, std::int64_t rows, int threads,
                                std::int16_t* out) const {
  const std::int64_t lanes = row_lanes(dim_);
  const std::int64_t blocks = (rows + kRowsAtOnce - 1) / kRowsAtOnce;
  parallel_ranges(blocks, threads, [&](std::int64_t first, std::int64_t last) {
    AlignedArray<std::int8_t> x(kRowsAtOnce * row_bytes(dim_));
    AlignedArray<std::int32_t> padded(lanes == dim_ ? 0 : kRowsAtOnce * lanes);
    for (std::int64_t row = first * kRowsAtOnce; row < std::min(rows, last * kRowsAtOnce);
         row += kRowsAtOnce) {
      const std::int64_t count = std::min(kRowsAtOnce, rows - row);
      const std::int32_t* from = residual + row * dim_;
      if (lanes != dim_) {
        for (std::int64_t r = 0; r < count; ++r) {
          std::copy_n(from + r * dim_, dim_, padded.data() + r * lanes);
        }
        from = padded.data();
      }
      head_gain_.run(from, count, x.data());
      linear_kernels().to_words(head_.map(), x.data(), row_bytes(dim_), count,
                                out + row * codebook_, codebook_);
    }
  });
}

}  // namespace percov2
