// Fuzzing of the integer transformer: parameters at the ends of their ranges, entries anywhere,
// refused parameters.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "fuzz.h"
#include "isa.h"
#include "random_model.h"

namespace percov2_test {
namespace {

constexpr std::int64_t kEverywhere[] = {
    INT32_MIN, INT32_MIN + 1,  -64,           -32,      -17, -1, 0, 15, 31, 32,
    16383,     INT32_MAX - 16, INT32_MAX - 1, INT32_MAX};

std::int32_t anywhere(Random& random) {
  if (random.one_in(2)) {
    return static_cast<std::int32_t>(kEverywhere[random.between(
        0, static_cast<std::int64_t>(sizeof kEverywhere / sizeof *kEverywhere) - 1)]);
  }
  return static_cast<std::int32_t>(random.one_in(4) ? random.hostile() : random.between(-40, 80));
}

// Some coordinates and times replaced by anything; the first three keys stay start entries.
void scatter(Random& random, Entries& entries, std::size_t first) {
  for (std::size_t i = first; i < entries.row.size(); ++i) {
    if (random.one_in(6)) entries.row[i] = anywhere(random);
    if (random.one_in(6)) entries.column[i] = anywhere(random);
    if (random.one_in(6)) entries.stage[i] = anywhere(random);
    if (first > 0 && entries.row[i] < 0 && !random.one_in(40)) entries.row[i] = 0;
  }
}

bool in_range(const Entries& entries) {
  for (std::size_t i = 0; i < entries.row.size(); ++i) {
    const std::int32_t row = entries.row[i], column = entries.column[i];
    const bool start = row == -1 && column == -1;
    if (!start && (row < 0 || column < 0 || row >= 16384 || column >= 16384)) return false;
    if (entries.stage[i] < 0 || entries.stage[i] == INT32_MAX) return false;
  }
  return true;
}

void fill_activations(Random& random, Fenced<std::int8_t>& values) {
  const bool extreme = random.one_in(3);
  for (std::int64_t i = 0; i < values.size(); ++i) {
    values[i] = static_cast<std::int8_t>(symmetric(random, 127, extreme));
  }
}

}  // namespace

void fuzz_transformer(Random& random, Outcomes& outcomes) {
  Layer layer;
  layer.fill(random, !random.one_in(16));
  const percov2::IntegerLayer compiled(layer.view());
  const std::int64_t inner = layer.inner();
  const int threads = random_threads(random);

  const std::int64_t rows = random.between(0, random.one_in(8) ? 150 : 12);
  Fenced<std::int32_t> contents(rows * layer.dim, random.one_in(2));
  fill_residual(random, contents.data(), rows, layer.dim);
  Fenced<std::int8_t> some_k(rows * inner), some_v(rows * inner);
  compiled.keys_values(contents.data(), rows, threads, some_k.data(), some_v.data());
  for (std::int64_t i = 0; i < rows * inner; ++i) {
    PERCOV2_PROMISE(some_k[i] >= -127 && some_v[i] >= -127);
  }

  const std::int64_t high = random.between(1, 40), wide = random.between(1, 80);
  Entries keys = grid_keys(random, high, wide, random.pick({1, 4, 40}));
  Entries readers = grid_readers(random, high, wide, random.between(0, 40));
  const bool hostile = random.one_in(2);
  if (hostile) {
    scatter(random, keys, random.one_in(10) ? 0 : 3);
    scatter(random, readers, 0);
  }
  const std::int64_t batch = random.between(1, 3);
  const std::int64_t stride = keys.count() + random.between(0, 3);
  Fenced<std::int8_t> k(batch * stride * inner, random.one_in(4));
  Fenced<std::int8_t> v(batch * stride * inner, random.one_in(4));
  fill_activations(random, k);
  fill_activations(random, v);
  Fenced<std::int32_t> residual(batch * readers.count() * layer.dim, random.one_in(4));
  fill_residual(random, residual.data(), batch * readers.count(), layer.dim);
  const std::vector<std::int32_t> before(residual.data(), residual.data() + residual.size());
  const bool done = returns(outcomes, [&] {
    compiled.advance(residual.data(), batch, readers.view(), k.data(), v.data(), stride,
                     keys.view(), threads);
  });
  PERCOV2_PROMISE(done || hostile);
  PERCOV2_PROMISE(!done || (in_range(keys) && in_range(readers)));
  for (std::int64_t i = 0; i < residual.size(); ++i) {
    PERCOV2_PROMISE(residual[i] >= -kResidual && residual[i] <= kResidual);
  }
  if (done) {
    const std::vector<std::int32_t> after(residual.data(), residual.data() + residual.size());
    std::copy(before.begin(), before.end(), residual.data());
    percov2::use_isa(percov2::Isa::kScalar);
    compiled.advance(residual.data(), batch, readers.view(), k.data(), v.data(), stride,
                     keys.view(), 1);
    PERCOV2_PROMISE(std::equal(after.begin(), after.end(), residual.data()));
  }

  Linear linear;
  linear.fill(random, random.size(1, 600), layer.dim, 20000);
  const percov2::IntegerHead head(layer.dim, layer.mlp_gain.data(), linear.view());
  Fenced<std::int16_t> logits(rows * linear.outputs, random.one_in(2));
  head.logits(contents.data(), rows, threads, logits.data());
  ++outcomes.accepted;
}

void fuzz_transformer_parameters(Random& random, Outcomes& outcomes) {
  Layer layer;
  layer.fill(random, true);
  Linear* const maps[] = {&layer.q, &layer.kv, &layer.out, &layer.up, &layer.down};
  Linear& map = *maps[random.between(0, 4)];
  const auto output = static_cast<std::size_t>(random.between(0, map.outputs - 1));
  switch (random.between(0, 4)) {
    case 0:
      map.multiplier[output] = static_cast<std::int8_t>(random.pick({0, -1, -128}));
      break;
    case 1:
      map.shift[output] = static_cast<std::int8_t>(random.pick({0, -1, -128, 25, 31, 32, 127}));
      break;
    case 2:
      layer.score_shift[static_cast<std::size_t>(random.between(0, layer.heads - 1))] =
          static_cast<std::int8_t>(random.pick({0, -1, -128, 13, 31, 32, 127}));
      break;
    case 3:
      layer.gain_bits = static_cast<int>(random.pick({-1, 6, 31, INT32_MAX, INT32_MIN}));
      break;
    default: {
      Layer wide = layer;
      wide.head_dim = random.pick({0, -1, 65, 1 << 20});
      PERCOV2_PROMISE(!returns(outcomes, [&] { percov2::IntegerLayer refused(wide.view()); }));
      return;
    }
  }
  PERCOV2_PROMISE(!returns(outcomes, [&] { percov2::IntegerLayer refused(layer.view()); }));
}

}  // namespace percov2_test
