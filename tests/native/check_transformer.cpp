// LayerNorm, linear maps, attention, layers and heads of every instruction set against
// plain_transformer.h, through the interface that the bindings use.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "check.h"
#include "plain_transformer.h"
#include "random_model.h"

namespace percov2_test {
namespace {

struct Subjects {
  Subject norm{"layer norm"}, head{"head"}, keys{"keys and values"};
  Subject attention{"attention"}, layer{"layer"};

  bool report() const {
    bool equal = true;
    for (const Subject* s : {&norm, &head, &keys, &attention, &layer}) {
      equal = s->report() && equal;
    }
    return equal;
  }
};

plain::Numbers row_of(const Fenced<std::int32_t>& values, std::int64_t row, std::int64_t width) {
  return plain::Numbers(values.data() + row * width, values.data() + (row + 1) * width);
}

void append(std::vector<std::int64_t>& all, const plain::Numbers& more) {
  all.insert(all.end(), more.begin(), more.end());
}

// x -> clamp(x, -127, 127), so that what enters the map comes out.
Linear identity(std::int64_t size) {
  Linear map;
  map.outputs = map.terms = size;
  map.weight.assign(static_cast<std::size_t>(size * size), 0);
  for (std::int64_t i = 0; i < size; ++i) map.weight[static_cast<std::size_t>(i * size + i)] = 1;
  map.bias.assign(static_cast<std::size_t>(size), 0);
  map.multiplier.assign(static_cast<std::size_t>(size), 2);
  map.shift.assign(static_cast<std::size_t>(size), 1);
  return map;
}

Linear zero(std::int64_t outputs, std::int64_t terms) {
  Linear map;
  map.outputs = outputs;
  map.terms = terms;
  map.weight.assign(static_cast<std::size_t>(outputs * terms), 0);
  map.bias.assign(static_cast<std::size_t>(outputs), 0);
  map.multiplier.assign(static_cast<std::size_t>(outputs), 1);
  map.shift.assign(static_cast<std::size_t>(outputs), 1);
  return map;
}

// Rows along the signs of a map's weights: its accumulators come near their limits.
void align(Random& random, const Linear& map, std::int32_t* residual, std::int64_t rows) {
  for (std::int64_t r = 0; r < rows; ++r) {
    if (random.one_in(2)) continue;
    const std::int64_t output = random.between(0, map.outputs - 1);
    const std::int64_t size = random.pick({3000, 400000, kResidual});
    for (std::int64_t t = 0; t < map.terms; ++t) {
      const int w = map.weight[static_cast<std::size_t>(output * map.terms + t)];
      residual[r * map.terms + t] = static_cast<std::int32_t>(w < 0 ? -size : size);
    }
  }
}

void check_heads(Random& random, Subjects& subjects, const std::vector<percov2::Isa>& sets) {
  const std::int64_t dim = random.one_in(8) ? random.between(1, 1024) : random.between(1, 130);
  const std::int64_t rows = random.pick({1, 2, 3, 5, 8, 13, 65});
  std::vector<std::int16_t> gain;
  const bool extreme = random.one_in(2);
  const std::int64_t limit = random.pick({16, 100, 2047});
  for (std::int64_t i = 0; i < dim; ++i) {
    gain.push_back(static_cast<std::int16_t>(symmetric(random, limit, extreme)));
  }
  Linear map;
  map.fill(random, random.size(1, 300), dim, 20000);
  Fenced<std::int32_t> residual(rows * dim, random.one_in(2));
  fill_residual(random, residual.data(), rows, dim);
  align(random, map, residual.data(), rows);
  std::vector<std::int64_t> norms, logits;
  for (std::int64_t r = 0; r < rows; ++r) {
    const plain::Numbers x = plain::layer_norm(row_of(residual, r, dim), gain);
    append(norms, x);
    append(logits, plain::linear(map, x, -32768, 32767));
  }
  const Linear same = identity(dim);
  for (const percov2::Isa isa : sets) {
    percov2::use_isa(isa);
    const int threads = random.one_in(4) ? 2 : 1;
    Fenced<std::int16_t> out(rows * dim, random.one_in(2));
    percov2::IntegerHead(dim, gain.data(), same.view())
        .logits(residual.data(), rows, threads, out.data());
    subjects.norm.compare(out.data(), norms.data(), rows * dim, rows, dim);
    Fenced<std::int16_t> got(rows * map.outputs, random.one_in(2));
    percov2::IntegerHead(dim, gain.data(), map.view())
        .logits(residual.data(), rows, threads, got.data());
    subjects.head.compare(got.data(), logits.data(), got.size(), dim, map.outputs);
  }
}

void check_keys(Random& random, const Layer& layer, Subjects& subjects,
                const std::vector<percov2::Isa>& sets) {
  const std::int64_t rows = random.pick({1, 2, 7, 16, 33, 70}), inner = layer.inner();
  Fenced<std::int32_t> residual(rows * layer.dim, random.one_in(2));
  fill_residual(random, residual.data(), rows, layer.dim);
  align(random, layer.kv, residual.data(), rows);
  std::vector<std::int64_t> k, v;
  for (std::int64_t r = 0; r < rows; ++r) {
    const plain::Numbers x =
        plain::layer_norm(row_of(residual, r, layer.dim), layer.attention_gain);
    const plain::Numbers both = plain::linear(layer.kv, x, -127, 127);
    k.insert(k.end(), both.begin(), both.begin() + inner);
    v.insert(v.end(), both.begin() + inner, both.end());
  }
  for (const percov2::Isa isa : sets) {
    percov2::use_isa(isa);
    const percov2::IntegerLayer compiled(layer.view());
    Fenced<std::int8_t> got_k(rows * inner, random.one_in(2)), got_v(rows * inner);
    compiled.keys_values(residual.data(), rows, random.one_in(4) ? 2 : 1, got_k.data(),
                         got_v.data());
    subjects.keys.compare(got_k.data(), k.data(), rows * inner, layer.dim, inner);
    subjects.keys.compare(got_v.data(), v.data(), rows * inner, layer.dim, inner);
  }
}

void check_layer(Random& random, const Layer& layer, Subject& subject,
                 const std::vector<percov2::Isa>& sets) {
  const std::int64_t high = random.between(1, 40), wide = random.between(1, 70);
  const Entries keys = grid_keys(random, high, wide, random.pick({1, 3, 30}));
  const Entries readers = grid_readers(random, high, wide, random.between(1, 24));
  const std::int64_t batch = random.between(1, 2), inner = layer.inner(), dim = layer.dim;
  const std::int64_t stride = keys.count() + random.between(0, 2);
  Fenced<std::int8_t> k(batch * stride * inner, random.one_in(4)), v(batch * stride * inner);
  const bool extreme = random.one_in(3);
  for (auto* values : {&k, &v}) {
    for (std::int64_t i = 0; i < values->size(); ++i) {
      (*values)[i] = static_cast<std::int8_t>(symmetric(random, 127, extreme));
    }
  }
  Fenced<std::int32_t> residual(batch * readers.count() * dim);
  fill_residual(random, residual.data(), batch * readers.count(), dim);
  std::vector<std::int64_t> expected;
  for (std::int64_t b = 0; b < batch; ++b) {
    for (std::int64_t i = 0; i < readers.count(); ++i) {
      const std::int64_t offset = b * stride * inner;
      append(expected, plain::advance(layer, row_of(residual, b * readers.count() + i, dim),
                                      readers, static_cast<std::size_t>(i), k.data() + offset,
                                      v.data() + offset, keys));
    }
  }
  for (const percov2::Isa isa : sets) {
    percov2::use_isa(isa);
    const percov2::IntegerLayer compiled(layer.view());
    Fenced<std::int32_t> got(residual.size(), random.one_in(2));
    std::copy_n(residual.data(), residual.size(), got.data());
    compiled.advance(got.data(), batch, readers.view(), k.data(), v.data(), stride, keys.view(),
                     random.one_in(4) ? 3 : 1);
    subject.compare(got.data(), expected.data(), got.size(), keys.count(), layer.head_dim);
  }
}

// A layer whose output shows its attention: the mean is added to the residual, the feed-forward
// part adds nothing.
void bare_attention(Layer& layer) {
  layer.dim = layer.inner();
  layer.attention_gain.assign(static_cast<std::size_t>(layer.dim), 100);
  layer.mlp_gain.assign(static_cast<std::size_t>(layer.dim), 100);
  layer.q = identity(layer.dim);
  layer.kv = zero(2 * layer.dim, layer.dim);
  layer.out = identity(layer.dim);
  layer.hidden = 1;
  layer.up = zero(1, layer.dim);
  layer.down = zero(layer.dim, 1);
}

}  // namespace

bool check_transformer(std::int64_t effort, std::uint64_t seed) {
  const auto sets = instruction_sets();
  Subjects subjects;
  for (std::int64_t n = 0; n < 8 * effort; ++n) {
    Random random(seed * 2000003 + static_cast<std::uint64_t>(n));
    for (int i = 0; i < 3; ++i) check_heads(random, subjects, sets);
    Layer layer;
    layer.fill(random, n % 8 != 0);
    check_keys(random, layer, subjects, sets);
    check_layer(random, layer, subjects.layer, sets);
    Layer bare;
    bare.fill(random, true);
    bare_attention(bare);
    check_layer(random, bare, subjects.attention, sets);
  }
  return subjects.report();
}

}  // namespace percov2_test
