// check_kernels [<effort> [<seed>]]: LayerNorm, GELU, linear maps, attention, heads and passes of
// every instruction set that this machine runs give the integers of plain_transformer.h. Prints one
// line for each subject; exits with 1 if anything differs.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "check.h"
#include "plain_transformer.h"
#include "random_model.h"

namespace percov2_test {
namespace {

struct Subjects {
  Subject norm{"layer norm"}, bytes{"linear to bytes"}, words{"linear to words"};
  Subject sums{"linear added"}, look_up{"gelu"}, head{"head"};
  Subject attention{"attention"}, one_pass{"one pass"}, staged{"staged passes"};

  bool report() const {
    bool equal = true;
    for (const Subject* s :
         {&norm, &bytes, &words, &sums, &look_up, &head, &attention, &one_pass, &staged}) {
      equal = s->report() && equal;
    }
    return equal;
  }
};

void append(std::vector<std::int64_t>& all, const plain::Numbers& more) {
  all.insert(all.end(), more.begin(), more.end());
}

template <class T>
plain::Numbers row_of(const Fenced<T>& values, std::int64_t row, std::int64_t stride,
                      std::int64_t width) {
  const T* first = values.data() + row * stride;
  return plain::Numbers(first, first + width);
}

void check_norms(Random& random, Subjects& subjects, const std::vector<percov2::Isa>& sets) {
  const std::int64_t dim = random.one_in(8) ? random.between(1, 1024) : random.between(1, 130);
  const std::int64_t rows = random.pick({1, 2, 3, 5, 8, 13}), lanes = percov2::row_lanes(dim);
  std::vector<std::int16_t> gain;
  const bool extreme = random.one_in(2);
  const std::int64_t limit = random.pick({16, 100, 2047});
  for (std::int64_t i = 0; i < dim; ++i) {
    gain.push_back(static_cast<std::int16_t>(symmetric(random, limit, extreme)));
  }
  std::vector<std::int32_t> dense(static_cast<std::size_t>(rows * dim));
  fill_residual(random, dense.data(), rows, dim);
  Fenced<std::int32_t> residual(rows * lanes, random.one_in(2));
  std::vector<std::int64_t> expected;
  for (std::int64_t r = 0; r < rows; ++r) {
    std::copy_n(dense.data() + r * dim, dim, residual.data() + r * lanes);
    append(expected, plain::layer_norm(row_of(residual, r, lanes, dim), gain));
    expected.resize(static_cast<std::size_t>((r + 1) * percov2::row_bytes(dim)), 0);
  }
  std::vector<std::int8_t> table(256);
  for (auto& entry : table) entry = static_cast<std::int8_t>(symmetric(random, 127, false));
  const std::int64_t count = 64 * random.between(1, 9);
  std::vector<std::int8_t> values;
  std::vector<std::int64_t> looked_up;
  for (std::int64_t i = 0; i < count; ++i) {
    values.push_back(static_cast<std::int8_t>(symmetric(random, 127, false)));
    looked_up.push_back(table[static_cast<std::uint8_t>(values.back())]);
  }
  const percov2::NormGain norm(gain.data(), dim);
  for (const percov2::Isa isa : sets) {
    percov2::use_isa(isa);
    Fenced<std::int8_t> out(rows * percov2::row_bytes(dim), random.one_in(2));
    norm.run(residual.data(), rows, out.data());
    subjects.norm.compare(out.data(), expected.data(), out.size(), rows, dim);
    Fenced<std::int8_t> got(count, random.one_in(2));
    std::copy(values.begin(), values.end(), got.data());
    percov2::norm_kernels().look_up(table.data(), got.data(), count);
    subjects.look_up.compare(got.data(), looked_up.data(), count, count, 0);
  }
}

void check_maps(Random& random, Subjects& subjects, const std::vector<percov2::Isa>& sets) {
  const std::int64_t terms =
      random.one_in(8) ? random.pick({1040, random.between(1, 1040)}) : random.between(1, 140);
  Linear map;
  map.fill(random, random.size(1, 300), terms, random.pick({127, 20000, kResidual}));
  const std::int64_t rows = random.pick({1, 2, 3, 4, 5, 6, 7, 11, 12, 25}), n = map.outputs;
  const std::int64_t stride = percov2::row_bytes(terms), lanes = percov2::row_lanes(n);
  Fenced<std::int8_t> x(rows * stride, random.one_in(2));
  const bool extreme = random.one_in(3);
  for (std::int64_t i = 0; i < x.size(); ++i) {
    x[i] = static_cast<std::int8_t>(symmetric(random, 127, extreme));
  }
  for (std::int64_t r = 0; r < rows; r += random.between(1, 3)) {  // the largest sums
    const std::int64_t o = random.between(0, n - 1);
    for (std::int64_t t = 0; t < terms; ++t) {
      x[r * stride + t] = map.weight[static_cast<std::size_t>(o * terms + t)] < 0 ? -127 : 127;
    }
  }
  std::vector<std::int32_t> residual(static_cast<std::size_t>(rows * lanes));
  fill_residual(random, residual.data(), rows, lanes);
  std::vector<std::int64_t> bytes, words, sums;
  for (std::int64_t r = 0; r < rows; ++r) {
    const plain::Numbers in = row_of(x, r, stride, terms);
    append(bytes, plain::linear(map, in, -127, 127));
    bytes.resize(static_cast<std::size_t>((r + 1) * lanes), 0);
    append(words, plain::linear(map, in, -32768, 32767));
    plain::Numbers line(residual.data() + r * lanes, residual.data() + (r + 1) * lanes);
    plain::Numbers update = plain::linear(map, in, -kResidual, kResidual);
    update.resize(line.size(), 0);
    plain::add(line, update);
    append(sums, line);
  }
  const percov2::QuantizedLinear packed(map.view());
  for (const percov2::Isa isa : sets) {
    percov2::use_isa(isa);
    const percov2::LinearKernels& kernels = percov2::linear_kernels();
    Fenced<std::int8_t> got_bytes(rows * lanes, random.one_in(2));
    kernels.to_bytes(packed.map(), x.data(), stride, rows, got_bytes.data(), lanes);
    subjects.bytes.compare(got_bytes.data(), bytes.data(), rows * lanes, terms, n);
    Fenced<std::int16_t> got_words(rows * n, random.one_in(2));
    kernels.to_words(packed.map(), x.data(), stride, rows, got_words.data(), n);
    subjects.words.compare(got_words.data(), words.data(), rows * n, terms, n);
    Fenced<std::int32_t> got_sums(rows * lanes, random.one_in(2));
    std::copy(residual.begin(), residual.end(), got_sums.data());
    kernels.add_to(packed.map(), x.data(), stride, rows, got_sums.data(), lanes);
    subjects.sums.compare(got_sums.data(), sums.data(), rows * lanes, terms, n);
  }
}

// Keys, values and queries up to their limits, on a grid whose positions all have keys in the end.
void check_attention(Random& random, Subject& subject, const std::vector<percov2::Isa>& sets) {
  Layer layer;
  layer.fill_sizes(random, true);
  layer.fill(random);
  const bool strip = random.one_in(8);  // from 128 columns on rows are padded further
  const std::int64_t high = random.between(1, strip ? 4 : 40);
  const std::int64_t wide = strip ? random.between(112, 300) : random.between(1, 70);
  const std::int64_t inner = layer.inner();
  const std::vector<std::int32_t> stages = random_stages(random, high * wide);
  const percov2::StageGrid grid(stages.data(), high, wide);
  const percov2::KeyLayout layout(grid, layer.heads, layer.head_dim);
  percov2::AlignedArray<std::int8_t> memory(layout.bytes());
  const bool extreme = random.one_in(3);
  const auto draw = [&](std::int64_t count) {
    std::vector<std::int8_t> values;
    for (std::int64_t i = 0; i < count; ++i) {
      values.push_back(static_cast<std::int8_t>(symmetric(random, 127, extreme)));
    }
    return values;
  };
  plain::Entries keys, readers;
  std::vector<plain::Numbers> k, v;
  for (std::int64_t j = -3; j < high * wide; ++j) {
    const std::vector<std::int8_t> kv = draw(2 * inner);
    k.emplace_back(kv.begin(), kv.begin() + inner);
    v.emplace_back(kv.begin() + inner, kv.end());
    // Start entries -3, -2, -1 are numbers 0, 1, 2, stored as -1, -2, -3.
    layout.store(grid, j < 0 ? -4 - j : j, kv.data(), memory.data());
    if (j < 0) {
      keys.add(-1, -1, 0);
    } else {
      keys.add(j / wide, j % wide, stages[static_cast<std::size_t>(j)]);
    }
  }
  std::vector<percov2::Sight> sights;
  for (std::int64_t i = random.between(1, 20); i > 0; --i) {
    if (random.one_in(10)) {
      sights.push_back(percov2::StageGrid::start_sight());
      readers.add(-1, -1, 0);
      continue;
    }
    // A reader and its partner, at most two rows and one column away, or the reader alone.
    const std::int64_t row = random.between(0, high - 1), column = random.between(0, wide - 1);
    const std::int64_t below = std::min(high - 1, row + random.between(0, 2));
    const std::int64_t beside =
        std::clamp<std::int64_t>(column + random.between(-1, 1), 0, wide - 1);
    const auto one = static_cast<std::int32_t>(row * wide + column);
    const auto other = static_cast<std::int32_t>(below * wide + beside);
    const bool alone = random.one_in(4);
    for (const auto& [at, partner] : {std::pair{one, alone ? one : other}, {other, one}}) {
      const bool content = random.one_in(2);
      sights.push_back(content ? grid.content_sight(at, partner) : grid.query_sight(at, partner));
      readers.add(at / wide, at % wide, stages[static_cast<std::size_t>(at)] - (content ? 0 : 1));
      if (alone) break;
    }
  }
  const auto count = static_cast<std::int64_t>(sights.size());
  const std::int64_t stride = percov2::row_bytes(inner);
  const std::vector<std::int8_t> q = draw(count * stride + 64);
  std::vector<std::int64_t> expected;
  for (std::int64_t i = 0; i < count; ++i) {
    const plain::Numbers mine(q.data() + i * stride, q.data() + i * stride + inner);
    append(expected, plain::attend(layer, mine, readers, static_cast<std::size_t>(i), k, v, keys));
  }
  const percov2::ScoreTables scores(layer.score_bias.data(), layer.score_shift.data(),
                                    layer.gain_bits, layer.heads);
  for (const percov2::Isa isa : sets) {
    percov2::use_isa(isa);
    Fenced<std::int8_t> mean(count * inner, random.one_in(2));
    for (std::int64_t h = 0; h < layer.heads; ++h) {
      std::vector<percov2::Reader> all;
      for (std::int64_t i = 0; i < count; ++i) {
        all.push_back({sights[static_cast<std::size_t>(i)],
                       q.data() + i * stride + h * layer.head_dim,
                       mean.data() + i * inner + h * layer.head_dim});
      }
      percov2::attention_kernels().attend(layout.head(grid, memory.data(), h), scores.head(h),
                                          all.data(), count);
    }
    subject.compare(mean.data(), expected.data(), mean.size(), keys.row.size(), layer.head_dim);
  }
}

// A whole model on a small batch, in one pass and by stages.
void check_passes(Random& random, Subjects& subjects, const std::vector<percov2::Isa>& sets,
                  bool small) {
  Model model;
  model.fill(random, small);
  const std::int64_t high = random.between(1, 9), wide = random.between(1, random.pick({9, 20}));
  const std::int64_t batch = random.between(1, 3), positions = high * wide, dim = model.dim;
  const std::vector<std::int32_t> stages = random_stages(random, positions);
  Fenced<std::int32_t> tokens(batch * positions, random.one_in(2));
  for (std::int64_t i = 0; i < tokens.size(); ++i) {
    tokens[i] = static_cast<std::int32_t>(random.between(0, model.codebook - 1));
  }
  std::vector<std::vector<plain::Numbers>> raster;
  for (std::int64_t b = 0; b < batch; ++b) {
    raster.push_back(plain::encode(model, stages, high, wide, tokens.data() + b * positions));
  }
  const percov2::IntegerTransformer compiled(model.view());
  const percov2::TokenPass pass(compiled, stages.data(), high, wide);
  const auto& order = pass.grid().order();
  // Coded positions first .. last of all images.
  const auto part = [&](std::int64_t first, std::int64_t last) {
    std::vector<std::int64_t> all;
    for (const auto& image : raster) {
      for (std::int64_t i = first; i < last; ++i) {
        append(all, image[static_cast<std::size_t>(order[static_cast<std::size_t>(i)])]);
      }
    }
    return all;
  };
  std::vector<std::int64_t> logits;
  for (const auto& r : raster[0]) {
    append(logits, plain::linear(model.head, plain::layer_norm(r, model.head_gain), -32768, 32767));
  }
  Fenced<std::int32_t> last(positions * dim, random.one_in(2));
  for (std::int64_t i = 0; i < positions; ++i) {
    std::copy_n(raster[0][static_cast<std::size_t>(i)].begin(), dim, last.data() + i * dim);
  }
  for (const percov2::Isa isa : sets) {
    percov2::use_isa(isa);
    const int threads = random.one_in(4) ? static_cast<int>(random.between(2, 3)) : 1;
    Fenced<std::int32_t> got(batch * positions * dim, random.one_in(2));
    pass.encode(tokens.data(), batch, threads, got.data());
    subjects.one_pass.compare(got.data(), part(0, positions).data(), got.size(), positions, dim);
    Fenced<std::int16_t> got_logits(positions * model.codebook, random.one_in(2));
    compiled.logits(last.data(), positions, threads, got_logits.data());
    subjects.head.compare(got_logits.data(), logits.data(), got_logits.size(), dim, model.codebook);

    percov2::StagedPass staged(compiled, stages.data(), high, wide, batch);
    for (std::int64_t known = 0; staged.next_count() > 0;) {
      const std::int64_t count = staged.next_count();
      Fenced<std::int32_t> next(batch * count * dim, random.one_in(2));
      staged.decode(threads, next.data());
      subjects.staged.compare(next.data(), part(known, known + count).data(), next.size(), known,
                              dim);
      std::vector<std::int32_t> decoded;
      for (std::int64_t b = 0; b < batch; ++b) {
        for (std::int64_t i = known; i < known + count; ++i) {
          decoded.push_back(tokens[b * positions + order[static_cast<std::size_t>(i)]]);
        }
      }
      staged.accept(decoded.data());
      known += count;
    }
  }
}

}  // namespace
}  // namespace percov2_test

int main(int argc, char** argv) {
  using namespace percov2_test;
  const std::int64_t effort = argc > 1 ? std::atoll(argv[1]) : 10;
  const std::uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  const auto sets = instruction_sets();
  std::printf("instruction sets:");
  for (const percov2::Isa isa : sets) std::printf(" %s", percov2::isa_name(isa));
  std::printf("\n");
  Subjects subjects;
  for (std::int64_t n = 0; n < 8 * effort; ++n) {
    Random random(seed * 2000003 + static_cast<std::uint64_t>(n));
    for (int i = 0; i < 3; ++i) {
      check_norms(random, subjects, sets);
      check_maps(random, subjects, sets);
    }
    check_attention(random, subjects.attention, sets);
    check_passes(random, subjects, sets, n % 8 != 0);
  }
  return subjects.report() ? 0 : 1;
}
