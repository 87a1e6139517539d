// The integer transformer as docs/reference/entropy-model.md states it: 64-bit integers, one number
// at a time, sharing nothing with csrc.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "random_model.h"

namespace plain {

using Numbers = std::vector<std::int64_t>;

// The quotient rounded down, also of negative numbers.
inline std::int64_t floor_divide(std::int64_t a, std::int64_t b) {
  const std::int64_t quotient = a / b;
  return a % b != 0 && (a < 0) != (b < 0) ? quotient - 1 : quotient;
}

inline std::int64_t clamp(std::int64_t x, std::int64_t low, std::int64_t high) {
  return x < low ? low : x > high ? high : x;
}

// The largest integer whose square is <= n, bit by bit.
inline std::int64_t integer_sqrt(std::int64_t n) {
  std::int64_t root = 0;
  for (std::int64_t bit = std::int64_t{1} << 30; bit > 0; bit /= 2) {
    if ((root + bit) * (root + bit) <= n) root += bit;
  }
  return root;
}

inline Numbers linear(const percov2_test::Linear& map, const Numbers& x, std::int64_t low,
                      std::int64_t high) {
  Numbers y;
  for (std::int64_t o = 0; o < map.outputs; ++o) {
    const auto at = static_cast<std::size_t>(o);
    std::int64_t acc = map.bias[at];
    for (std::int64_t t = 0; t < map.terms; ++t) {
      acc +=
          map.weight[static_cast<std::size_t>(o * map.terms + t)] * x[static_cast<std::size_t>(t)];
    }
    const std::int64_t unit = std::int64_t{1} << map.shift[at];
    y.push_back(clamp(floor_divide(acc * map.multiplier[at] + unit / 2, unit), low, high));
  }
  return y;
}

inline Numbers layer_norm(const Numbers& residual, const std::vector<std::int16_t>& gain) {
  const auto d = static_cast<std::int64_t>(residual.size());
  std::int64_t sum = 0, energy = 0;
  for (const std::int64_t r : residual) sum += r;
  const std::int64_t mean = floor_divide(sum + d / 2, d);
  for (const std::int64_t r : residual) energy += (r - mean) * (r - mean);
  const std::int64_t root = integer_sqrt(energy * 256 / d) + 1;
  Numbers out;
  for (std::size_t i = 0; i < residual.size(); ++i) {
    const std::int64_t scaled = (residual[i] - mean) * gain[i] + root / 2;
    out.push_back(clamp(floor_divide(scaled, root), -127, 127));
  }
  return out;
}

// floor(126.61 * 2^(-distance / 16) + 1/2): never within 0.005 of a half, so double decides it.
inline std::int64_t attention_weight(std::int64_t distance) {
  if (distance > 127) return 0;
  return static_cast<std::int64_t>(
      std::floor(126.61 * std::exp2(-static_cast<double>(distance) / 16) + 0.5));
}

// Positions and times of readers or keys; start entries have row -1.
struct Entries {
  std::vector<std::int64_t> row, column, stage;

  void add(std::int64_t r, std::int64_t c, std::int64_t s) {
    row.push_back(r);
    column.push_back(c);
    stage.push_back(s);
  }
  std::size_t count() const { return row.size(); }
};

// Attention of reader i over all keys, the start entries first: q and the result
// [heads * head_dim], k and v one row per key.
inline Numbers attend(const percov2_test::Layer& layer, const Numbers& q, const Entries& readers,
                      std::size_t i, const std::vector<Numbers>& k, const std::vector<Numbers>& v,
                      const Entries& keys) {
  Numbers result;
  for (std::int64_t h = 0; h < layer.heads; ++h) {
    const std::int16_t* bias = layer.score_bias.data() + h * percov2_test::kBiasEntries;
    const std::int64_t unit = std::int64_t{1} << layer.score_shift[static_cast<std::size_t>(h)];
    const auto first = static_cast<std::size_t>(h * layer.head_dim);
    const auto last = first + static_cast<std::size_t>(layer.head_dim);
    std::vector<std::size_t> seen;
    Numbers scores;
    for (std::size_t j = 0; j < keys.count(); ++j) {
      if (keys.stage[j] > readers.stage[i]) continue;
      const std::int64_t dy = keys.row[j] - readers.row[i];
      const std::int64_t dx = keys.column[j] - readers.column[i];
      std::int64_t index = 961 + static_cast<std::int64_t>(j);
      if (j >= 3) {
        if (readers.row[i] < 0 || std::llabs(dy) > 15 || std::llabs(dx) > 15) continue;
        index = (dy + 15) * 31 + dx + 15;
      }
      std::int64_t product = 0;
      for (std::size_t c = first; c < last; ++c) product += q[c] * k[j][c];
      seen.push_back(j);
      scores.push_back(floor_divide(product + unit / 2, unit) + bias[index]);
    }
    const std::int64_t best = *std::max_element(scores.begin(), scores.end());
    std::int64_t total = 0;
    for (std::int64_t& score : scores) total += (score = attention_weight(best - score));
    for (std::size_t c = first; c < last; ++c) {
      std::int64_t sum = 0;
      for (std::size_t n = 0; n < seen.size(); ++n) sum += scores[n] * v[seen[n]][c];
      const std::int64_t gained = sum * (std::int64_t{1} << layer.gain_bits);
      result.push_back(clamp(floor_divide(gained + total / 2, total), -127, 127));
    }
  }
  return result;
}

inline void add(Numbers& residual, const Numbers& update) {
  for (std::size_t i = 0; i < residual.size(); ++i) {
    residual[i] = clamp(residual[i] + update[i], -percov2_test::kResidual, percov2_test::kResidual);
  }
}

// The residual of reader i after the layer.
inline Numbers advance(const percov2_test::Layer& layer, Numbers residual, const Entries& readers,
                       std::size_t i, const std::vector<Numbers>& k, const std::vector<Numbers>& v,
                       const Entries& keys) {
  const Numbers q = linear(layer.q, layer_norm(residual, layer.attention_gain), -127, 127);
  const std::int64_t limit = percov2_test::kResidual;
  add(residual, linear(layer.out, attend(layer, q, readers, i, k, v, keys), -limit, limit));
  Numbers hidden = linear(layer.up, layer_norm(residual, layer.mlp_gain), -127, 127);
  for (std::int64_t& x : hidden) x = layer.gelu[static_cast<std::size_t>(x + 128)];
  add(residual, linear(layer.down, hidden, -limit, limit));
  return residual;
}

// The payload of one entry: the sum of some rows of tables.
inline Numbers payload(std::int64_t dim, const std::vector<const std::int16_t*>& rows) {
  Numbers sum(static_cast<std::size_t>(dim), 0);
  for (const std::int16_t* row : rows) {
    for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += row[i];
  }
  return sum;
}

inline std::int64_t size_class(std::int64_t n) {
  std::int64_t bits = 0;
  while ((n - 1) >> bits > 0) ++bits;
  return std::min<std::int64_t>(bits, 16);
}

// The residual of all queries of one grid after the last layer, in raster order.
inline std::vector<Numbers> encode(const percov2_test::Model& model,
                                   const std::vector<std::int32_t>& stages, std::int64_t height,
                                   std::int64_t width, const std::int32_t* tokens) {
  const std::int64_t dim = model.dim;
  const auto row = [dim](const std::vector<std::int16_t>& table, std::int64_t i) {
    return table.data() + i * dim;
  };
  Entries keys, queries;
  std::vector<Numbers> known{
      payload(dim, {row(model.start, 0)}),
      payload(dim, {row(model.start, 1), row(model.height, size_class(height))}),
      payload(dim, {row(model.start, 2), row(model.width, size_class(width))})};
  std::vector<Numbers> asked;
  for (int s = 0; s < 3; ++s) keys.add(-1, -1, 0);
  for (std::int64_t i = 0; i < height * width; ++i) {
    const std::int64_t y = i / width, x = i % width, g = stages[static_cast<std::size_t>(i)];
    const auto* vertical = row(model.row, 16 * y / height);
    const auto* horizontal = row(model.column, 16 * x / width);
    keys.add(y, x, g);
    queries.add(y, x, g - 1);
    known.push_back(payload(dim, {row(model.token, tokens[i]), vertical, horizontal}));
    asked.push_back(payload(dim, {model.query.data(), vertical, horizontal}));
  }
  for (const percov2_test::Layer& layer : model.layers) {
    std::vector<Numbers> k, v;
    for (const Numbers& r : known) {
      const Numbers both = linear(layer.kv, layer_norm(r, layer.attention_gain), -127, 127);
      k.emplace_back(both.begin(), both.begin() + layer.inner());
      v.emplace_back(both.begin() + layer.inner(), both.end());
    }
    for (std::size_t i = 0; i < asked.size(); ++i) {
      asked[i] = advance(layer, asked[i], queries, i, k, v, keys);
    }
    for (std::size_t i = 0; i < known.size(); ++i) {
      known[i] = advance(layer, known[i], keys, i, k, v, keys);
    }
  }
  return asked;
}

}  // namespace plain
