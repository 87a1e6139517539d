// Random models of the integer transformer inside the ranges of docs/reference/entropy-model.md,
// which every loaded model has passed, up to their ends.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "random_input.h"
#include "transformer/transformer.h"

namespace percov2_test {

constexpr std::int64_t kBiasEntries = 31 * 31 + 3;
constexpr std::int64_t kResidual = 1 << 20;

// A number in -limit .. limit; `extreme`: mostly an end.
inline std::int64_t symmetric(Random& random, std::int64_t limit, bool extreme) {
  if (extreme && !random.one_in(4)) return random.one_in(2) ? limit : -limit;
  return random.between(-limit, limit);
}

struct Linear {
  std::int64_t outputs = 0, terms = 0;
  std::vector<std::int8_t> weight, multiplier, shift;
  std::vector<std::int32_t> bias;

  // 127 * sum |weight| + |bias| < 2^24 for every output. `reach` is about what the requantized
  // results should span, so that neither all are 0 nor all at their limit.
  void fill(Random& random, std::int64_t n, std::int64_t k, std::int64_t reach) {
    outputs = n;
    terms = k;
    weight.resize(static_cast<std::size_t>(n * k));
    for (std::int64_t o = 0; o < n; ++o) {
      const bool extreme = random.one_in(4);
      const std::int64_t limit = random.pick({127, 127, random.between(0, 127)});
      std::int64_t sum = 0;
      for (std::int64_t t = 0; t < k; ++t) {
        const std::int64_t w = symmetric(random, limit, extreme);
        weight[static_cast<std::size_t>(o * k + t)] = static_cast<std::int8_t>(w);
        sum += std::llabs(w);
      }
      const std::int64_t room = (1 << 24) - 1 - 127 * sum;
      bias.push_back(static_cast<std::int32_t>(
          random.one_in(4) ? symmetric(random, room, true)
                           : symmetric(random, std::min<std::int64_t>(room, 100000), false)));
      multiplier.push_back(static_cast<std::int8_t>(random.pick({1, 127, random.between(1, 127)})));
      int bits = 1;  // results of typical accumulators span about `reach`
      while (bits < 24 && ((60 * sum / 8 * multiplier.back()) >> bits) > reach) ++bits;
      shift.push_back(static_cast<std::int8_t>(
          random.one_in(8) ? random.pick({1, 24, random.between(1, 24)}) : bits));
    }
  }
  percov2::LinearParameters view() const {
    return {weight.data(), bias.data(), multiplier.data(), shift.data(), outputs, terms};
  }
};

struct Layer {
  std::int64_t dim = 0, heads = 0, head_dim = 0, hidden = 0;
  std::vector<std::int16_t> attention_gain, mlp_gain, score_bias;
  std::vector<std::int8_t> score_shift, gelu;
  int gain_bits = 0;
  Linear q, kv, out, up, down;

  std::int64_t inner() const { return heads * head_dim; }

  void fill_sizes(Random& random, bool small) {
    dim = random.one_in(12) && !small ? random.between(1, 1024) : random.between(1, 72);
    heads = random.between(1, 4);
    head_dim = random.pick({1, 2, 8, 15, 16, 17, 32, 33, 48, 63, 64, random.between(1, 64)});
    hidden = random.one_in(12) && !small ? random.between(1, 1040) : random.between(1, 80);
  }
  // The numbers, once the sizes are known.
  void fill(Random& random) {
    for (auto* gain : {&attention_gain, &mlp_gain}) {
      const bool extreme = random.one_in(4);
      const std::int64_t limit = random.pick({16, 100, 2047});
      for (std::int64_t i = 0; i < dim; ++i) {
        gain->push_back(static_cast<std::int16_t>(symmetric(random, limit, extreme)));
      }
    }
    q.fill(random, inner(), dim, 127);
    kv.fill(random, 2 * inner(), dim, 127);
    out.fill(random, dim, inner(), random.pick({1000, kResidual}));
    up.fill(random, hidden, dim, 127);
    down.fill(random, dim, hidden, random.pick({1000, kResidual}));
    const std::int64_t limit = random.pick({0, 16, 100, 2047});
    const bool extreme = random.one_in(3);
    for (std::int64_t i = 0; i < heads * kBiasEntries; ++i) {
      score_bias.push_back(static_cast<std::int16_t>(symmetric(random, limit, extreme)));
    }
    for (std::int64_t h = 0; h < heads; ++h) {
      score_shift.push_back(static_cast<std::int8_t>(random.between(5, 12)));
    }
    gain_bits = static_cast<int>(random.between(0, 5));
    for (int i = 0; i < 256; ++i) {
      gelu.push_back(static_cast<std::int8_t>(symmetric(random, 127, false)));
    }
  }
  percov2::LayerParameters view() const {
    percov2::LayerParameters p{};
    p.attention_gain = attention_gain.data();
    p.q = q.view();
    p.kv = kv.view();
    p.score_bias = score_bias.data();
    p.score_shift = score_shift.data();
    p.gain_bits = gain_bits;
    p.out = out.view();
    p.mlp_gain = mlp_gain.data();
    p.up = up.view();
    p.gelu = gelu.data();
    p.down = down.view();
    return p;
  }
};

// A whole model.
struct Model {
  std::int64_t codebook = 0, dim = 0;
  std::vector<std::int16_t> token, query, row, column, start, height, width, head_gain;
  std::vector<Layer> layers;
  Linear head;

  void fill(Random& random, bool small) {
    codebook = random.size(2, small ? 60 : 600);
    Layer first;
    first.fill_sizes(random, small);
    dim = first.dim;
    layers.assign(static_cast<std::size_t>(random.between(1, 3)), first);
    for (Layer& layer : layers) layer.fill(random);
    const bool extreme = random.one_in(4);
    const std::int64_t limit = random.pick({1, 5000, 32767});
    const auto draw = [&](std::vector<std::int16_t>& table, std::int64_t rows, std::int64_t most) {
      for (std::int64_t i = 0; i < rows * dim; ++i) {
        table.push_back(static_cast<std::int16_t>(symmetric(random, most, extreme)));
      }
    };
    draw(token, codebook, limit);
    for (auto* one : {&query, &head_gain}) draw(*one, 1, one == &query ? limit : 2047);
    for (auto* sixteenths : {&row, &column}) draw(*sixteenths, 16, limit);
    for (auto* classes : {&height, &width}) draw(*classes, 17, limit);
    draw(start, 3, limit);
    head.fill(random, codebook, dim, 20000);
  }
  percov2::TransformerParameters view() const {
    percov2::TransformerParameters p{};
    p.codebook = codebook;
    p.dim = dim;
    p.heads = layers[0].heads;
    p.head_dim = layers[0].head_dim;
    p.token = token.data();
    p.query = query.data();
    p.row = row.data();
    p.column = column.data();
    p.start = start.data();
    p.height = height.data();
    p.width = width.data();
    for (const Layer& layer : layers) p.layers.push_back(layer.view());
    p.head_gain = head_gain.data();
    p.head = head.view();
    return p;
  }
};

// A stage for every position of a grid, 1 .. S, none left out.
inline std::vector<std::int32_t> random_stages(Random& random, std::int64_t positions) {
  const std::int64_t stages = std::min(positions, random.pick({1, 2, 5, 12, 40}));
  std::vector<std::int32_t> stage;
  for (std::int64_t i = 0; i < positions; ++i) {
    stage.push_back(static_cast<std::int32_t>(i < stages ? i + 1 : random.between(1, stages)));
  }
  for (std::int64_t i = positions - 1; i > 0; --i) {
    std::swap(stage[static_cast<std::size_t>(i)],
              stage[static_cast<std::size_t>(random.between(0, i))]);
  }
  return stage;
}

// Residuals: rows of one kind each, up to the ends of the range.
inline void fill_residual(Random& random, std::int32_t* residual, std::int64_t rows,
                          std::int64_t dim) {
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int64_t limit = random.pick({0, 1, 5, 4096, 40000, kResidual});
    const bool extreme = random.one_in(4);
    const std::int64_t offset = random.one_in(3) ? symmetric(random, kResidual - limit, false) : 0;
    for (std::int64_t i = 0; i < dim; ++i) {
      residual[r * dim + i] = static_cast<std::int32_t>(offset + symmetric(random, limit, extreme));
    }
    if (random.one_in(8)) residual[r * dim + random.between(0, dim - 1)] = -kResidual;
  }
}

}  // namespace percov2_test
