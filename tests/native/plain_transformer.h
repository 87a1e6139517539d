// The integer transformer as docs/entropy-model.md states it: 64-bit integers, one number at a
// time, sharing nothing with csrc.
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

// Attention of reader i over all keys: q and the result [heads * head_dim].
inline Numbers attend(const percov2_test::Layer& layer, const Numbers& q,
                      const percov2_test::Entries& readers, std::size_t i, const std::int8_t* k,
                      const std::int8_t* v, const percov2_test::Entries& keys) {
  const std::int64_t inner = layer.inner();
  Numbers result;
  for (std::int64_t h = 0; h < layer.heads; ++h) {
    const std::int16_t* bias = layer.score_bias.data() + h * percov2_test::kBiasEntries;
    const std::int64_t unit = std::int64_t{1} << layer.score_shift[static_cast<std::size_t>(h)];
    Numbers seen, scores;
    for (std::int64_t j = 0; j < keys.count(); ++j) {
      const auto at = static_cast<std::size_t>(j);
      if (keys.stage[at] > readers.stage[i]) continue;
      const std::int64_t dy = keys.row[at] - readers.row[i];
      const std::int64_t dx = keys.column[at] - readers.column[i];
      std::int64_t index = 961 + j;
      if (j >= 3) {
        if (readers.row[i] < 0 || std::llabs(dy) > 15 || std::llabs(dx) > 15) continue;
        index = (dy + 15) * 31 + dx + 15;
      }
      std::int64_t product = 0;
      for (std::int64_t c = h * layer.head_dim; c < (h + 1) * layer.head_dim; ++c) {
        product += q[static_cast<std::size_t>(c)] * k[j * inner + c];
      }
      seen.push_back(j);
      scores.push_back(floor_divide(product + unit / 2, unit) + bias[index]);
    }
    const std::int64_t best = *std::max_element(scores.begin(), scores.end());
    std::int64_t total = 0;
    for (std::int64_t& score : scores) total += (score = attention_weight(best - score));
    for (std::int64_t c = h * layer.head_dim; c < (h + 1) * layer.head_dim; ++c) {
      std::int64_t sum = 0;
      for (std::size_t n = 0; n < seen.size(); ++n) sum += scores[n] * v[seen[n] * inner + c];
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
inline Numbers advance(const percov2_test::Layer& layer, Numbers residual,
                       const percov2_test::Entries& readers, std::size_t i, const std::int8_t* k,
                       const std::int8_t* v, const percov2_test::Entries& keys) {
  const Numbers q = linear(layer.q, layer_norm(residual, layer.attention_gain), -127, 127);
  const std::int64_t limit = percov2_test::kResidual;
  add(residual, linear(layer.out, attend(layer, q, readers, i, k, v, keys), -limit, limit));
  Numbers hidden = linear(layer.up, layer_norm(residual, layer.mlp_gain), -127, 127);
  for (std::int64_t& x : hidden) x = layer.gelu[static_cast<std::size_t>(x + 128)];
  add(residual, linear(layer.down, hidden, -limit, limit));
  return residual;
}

}  // namespace plain
