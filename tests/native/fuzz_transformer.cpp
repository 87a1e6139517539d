// Fuzzing of the integer transformer: parameters at the ends of their ranges, stage maps and tokens
// that may be anything, refused parameters.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "fuzz.h"
#include "random_model.h"
#include "support/isa.h"

namespace percov2_test {
namespace {

// Some numbers replaced by anything.
void scatter(Random& random, std::int32_t* values, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    if (random.one_in(12)) values[i] = static_cast<std::int32_t>(random.hostile());
  }
}

bool all_between(const std::int32_t* values, std::int64_t count, std::int64_t low,
                 std::int64_t high) {
  return std::all_of(values, values + count,
                     [&](std::int32_t value) { return value >= low && value <= high; });
}

bool without_gaps(const Fenced<std::int32_t>& stages) {
  const std::int32_t* end = stages.data() + stages.size();
  const std::int32_t last = *std::max_element(stages.data(), end);
  if (!all_between(stages.data(), stages.size(), 1, stages.size())) return false;
  for (std::int32_t g = 1; g <= last; ++g) {
    if (std::find(stages.data(), end, g) == end) return false;
  }
  return true;
}

// All stages of a batch; the tokens may be refused.
void fuzz_stages(Random& random, Outcomes& outcomes, const percov2::IntegerTransformer& model,
                 const Fenced<std::int32_t>& stages, std::int64_t wide, std::int64_t batch) {
  percov2::StagedPass staged(model, stages.data(), stages.size() / wide, wide, batch);
  while (staged.next_count() > 0) {
    const int threads = random_threads(random);
    const std::int64_t count = staged.next_count();
    Fenced<std::int32_t> residual(batch * count * model.dim(), random.one_in(2));
    staged.decode(threads, residual.data());
    PERCOV2_PROMISE(all_between(residual.data(), residual.size(), -kResidual, kResidual));
    Fenced<std::int32_t> tokens(batch * count, random.one_in(2));
    for (std::int64_t i = 0; i < tokens.size(); ++i) {
      tokens[i] = static_cast<std::int32_t>(random.between(0, model.codebook() - 1));
    }
    const bool hostile = random.one_in(10);
    if (hostile) scatter(random, tokens.data(), tokens.size());
    const bool fit = all_between(tokens.data(), tokens.size(), 0, model.codebook() - 1);
    PERCOV2_PROMISE(returns(outcomes, [&] { staged.accept(tokens.data()); }) == fit);
    if (!fit) return;
  }
  PERCOV2_PROMISE(!returns(outcomes, [&] { staged.accept(nullptr); }));
  PERCOV2_PROMISE(staged.next_count() == 0);
}

}  // namespace

void fuzz_transformer(Random& random, Outcomes& outcomes) {
  Model model;
  model.fill(random, !random.one_in(16));
  const percov2::IntegerTransformer compiled(model.view());
  const int threads = random_threads(random);
  const std::int64_t high = random.between(1, 12), wide = random.between(1, random.pick({9, 50}));
  const std::int64_t batch = random.between(0, 3), positions = high * wide;
  const std::vector<std::int32_t> drawn = random_stages(random, positions);
  Fenced<std::int32_t> stages(positions, random.one_in(2));
  std::copy(drawn.begin(), drawn.end(), stages.data());
  Fenced<std::int32_t> tokens(batch * positions, random.one_in(2));
  for (std::int64_t i = 0; i < tokens.size(); ++i) {
    tokens[i] = static_cast<std::int32_t>(random.between(0, model.codebook - 1));
  }
  if (random.one_in(4)) scatter(random, stages.data(), stages.size());
  if (random.one_in(4)) scatter(random, tokens.data(), tokens.size());
  Fenced<std::int32_t> residual(batch * positions * model.dim, random.one_in(2));
  const bool fit = without_gaps(stages);
  const bool known = all_between(tokens.data(), tokens.size(), 0, model.codebook - 1);
  const bool done = returns(outcomes, [&] {
    const percov2::TokenPass pass(compiled, stages.data(), high, wide);
    pass.encode(tokens.data(), batch, threads, residual.data());
  });
  PERCOV2_PROMISE(done == (fit && known));
  PERCOV2_PROMISE(all_between(residual.data(), residual.size(), -kResidual, kResidual));
  if (fit && batch > 0) fuzz_stages(random, outcomes, compiled, stages, wide, batch);

  const std::int64_t rows = random.between(0, random.one_in(8) ? 150 : 12);
  Fenced<std::int32_t> given(rows * model.dim, random.one_in(2));
  fill_residual(random, given.data(), rows, model.dim);
  Fenced<std::int16_t> logits(rows * model.codebook, random.one_in(2));
  compiled.logits(given.data(), rows, threads, logits.data());
  ++outcomes.accepted;
}

void fuzz_transformer_parameters(Random& random, Outcomes& outcomes) {
  Model model;
  model.fill(random, true);
  Layer& layer = model.layers[0];
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
          static_cast<std::int8_t>(random.pick({0, 4, -1, -128, 13, 31, 32, 127}));
      break;
    case 3:
      layer.gain_bits = static_cast<int>(random.pick({-1, 6, 31, INT32_MAX, INT32_MIN}));
      break;
    default: {
      percov2::TransformerParameters wide = model.view();
      wide.head_dim = random.pick({0, -1, 65, 1 << 20});
      PERCOV2_PROMISE(!returns(outcomes, [&] { percov2::IntegerTransformer refused(wide); }));
      return;
    }
  }
  PERCOV2_PROMISE(!returns(outcomes, [&] { percov2::IntegerTransformer refused(model.view()); }));
}

}  // namespace percov2_test
