// Fuzzing of what callers pass to the encoder and to the computation of intervals.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "coder/coder.h"
#include "fuzz.h"
#include "plain_coder.h"
#include "random_logits.h"
#include "streams.h"

namespace percov2_test {

void fuzz_encoder_arguments(Random& random, Outcomes& outcomes) {
  std::vector<std::uint32_t> checks(
      static_cast<std::size_t>(random.between(0, random.pick({6, 20}))));
  for (auto& check : checks) {
    check =
        static_cast<std::uint32_t>(random.one_in(24) ? random.hostile() : random.between(0, 65535));
  }
  std::unique_ptr<percov2::BatchEncoder> encoder;
  if (!returns(outcomes, [&] { encoder = std::make_unique<percov2::BatchEncoder>(checks); })) {
    PERCOV2_PROMISE(*std::max_element(checks.begin(), checks.end()) > 65535u);
    return;
  }
  std::vector<std::vector<plain::Interval>> said(checks.size());
  for (int calls = 0; calls < 4; ++calls) {
    std::vector<std::int64_t> counts(checks.size());
    std::int64_t total = 0;
    for (auto& count : counts) total += (count = random.size(0, 200));
    const int bits = static_cast<int>(random.between(8, 20));
    const std::int64_t size = std::int64_t{1} << bits;
    Fenced<std::int32_t> starts(total, random.one_in(4)), freqs(total, random.one_in(4));
    for (std::int64_t i = 0; i < total; ++i) {
      const std::int64_t freq =
          random.one_in(4) ? random.pick({1, 2, size, size - 1}) : random.between(1, size);
      freqs[i] = static_cast<std::int32_t>(freq);
      starts[i] =
          static_cast<std::int32_t>(random.pick({0, size - freq, random.between(0, size - freq)}));
    }
    bool hostile = false;
    if (total > 0 && random.one_in(4)) {
      hostile = true;
      const std::int64_t at = random.pick({0, total - 1, random.between(0, total - 1)});
      switch (random.between(0, 3)) {
        case 0:
          freqs[at] = static_cast<std::int32_t>(random.pick({0, -1, INT32_MIN}));
          break;
        case 1:
          starts[at] = static_cast<std::int32_t>(random.pick({-1, INT32_MIN, -size}));
          break;
        case 2:
          starts[at] = static_cast<std::int32_t>(size - freqs[at] + 1);
          break;
        default:
          starts[at] = freqs[at] = INT32_MAX;
      }
    }
    if (!counts.empty() && random.one_in(6)) {
      auto& count = counts[static_cast<std::size_t>(
          random.between(0, static_cast<std::int64_t>(counts.size()) - 1))];
      const std::int64_t before = count;
      count = random.one_in(2) ? random.hostile() : count + random.pick({-1, 1});
      hostile |= count != before;
    }
    int prob_bits = bits;
    if (random.one_in(12)) {
      hostile = true;
      prob_bits = static_cast<int>(random.pick({-1, 0, 7, 21, 31, 32, 64, INT32_MIN, INT32_MAX}));
    }
    const int threads = random_threads(random);
    std::vector<std::uint8_t> before, after;
    std::vector<std::int64_t> offsets;
    finish(*encoder, before, offsets);
    const bool pushed = returns(outcomes, [&] {
      encoder->push(starts.data(), freqs.data(), total, counts.data(), prob_bits, threads);
    });
    PERCOV2_PROMISE(pushed || hostile);
    if (!pushed) {  // all or none
      finish(*encoder, after, offsets);
      PERCOV2_PROMISE(before == after);
      continue;
    }
    std::int64_t at = 0;
    for (std::size_t b = 0; b < said.size(); ++b) {
      std::vector<plain::Interval> pushed_now;
      for (std::int64_t i = 0; i < counts[b]; ++i, ++at) {
        pushed_now.push_back({starts[at], freqs[at], prob_bits});
      }
      said[b].insert(said[b].begin(), pushed_now.begin(), pushed_now.end());
    }
  }
  std::vector<std::uint8_t> buffer;
  std::vector<std::int64_t> offsets;
  finish(*encoder, buffer, offsets);
  PERCOV2_PROMISE(offsets.size() == checks.size() + 1);
  for (std::size_t b = 0; b < said.size(); ++b) {
    PERCOV2_PROMISE(
        std::vector<std::uint8_t>(buffer.begin() + static_cast<std::ptrdiff_t>(offsets[b]),
                                  buffer.begin() + static_cast<std::ptrdiff_t>(offsets[b + 1])) ==
        plain::encode(checks[b], said[b]));
  }
}

void fuzz_interval_arguments(Random& random, Outcomes& outcomes) {
  Sizes sizes = random_sizes(random);
  const std::int64_t rows = random.between(0, std::min<std::int64_t>(65536 / sizes.codebook, 24));
  const RandomLogits rows_of(random, rows, sizes.codebook, random.one_in(8));
  percov2::Logits logits = rows_of.view();
  Fenced<std::int32_t> symbols(rows), starts(rows), freqs(rows);
  bool hostile = !rows_of.valid();
  for (std::int64_t r = 0; r < rows; ++r) {
    symbols[r] = static_cast<std::int32_t>(
        random.pick({0, sizes.codebook - 1, random.between(0, sizes.codebook - 1)}));
    if (random.one_in(100)) {
      symbols[r] = static_cast<std::int32_t>(random.one_in(2) ? random.hostile()
                                                              : random.pick({-1, sizes.codebook}));
      hostile |= symbols[r] < 0 || symbols[r] >= sizes.codebook;
    }
  }
  const std::int64_t codebook = sizes.codebook;
  if (random.one_in(6)) {
    hostile = true;
    logits.codebook = random.pick({-1, 0, 1, 8193, INT64_MAX, INT64_MIN});
  }
  if (random.one_in(6)) {
    hostile = true;
    sizes.prob_bits =
        static_cast<int>(random.pick({-1, 0, 7, 21, 31, 32, 64, INT32_MIN, INT32_MAX}));
  }
  int threads = random_threads(random);
  if (random.one_in(12)) {
    hostile = true;
    threads = static_cast<int>(random.pick({0, -1, INT32_MIN}));
  }
  const bool done = returns(outcomes, [&] {
    percov2::intervals(logits, symbols.data(), rows, sizes.prob_bits, threads, starts.data(),
                       freqs.data());
  });
  PERCOV2_PROMISE(done == !hostile);
  with_other_sets([&] {
    Fenced<std::int32_t> s(rows, random.one_in(2)), f(rows, random.one_in(2));
    PERCOV2_PROMISE(done == returns(outcomes, [&] {
                      percov2::intervals(logits, symbols.data(), rows, sizes.prob_bits, threads,
                                         s.data(), f.data());
                    }));
    PERCOV2_PROMISE(!done || (std::equal(s.data(), s.data() + rows, starts.data()) &&
                              std::equal(f.data(), f.data() + rows, freqs.data())));
  });
  if (hostile && logits.codebook != codebook) {
    Fenced<std::int32_t> nothing(0);
    PERCOV2_PROMISE(!returns(outcomes, [&] {
      percov2::cdf_table(logits, rows, sizes.prob_bits, threads, nothing.data());
    }));
    return;
  }
  Fenced<std::int32_t> cdf(rows * (codebook + 1), random.one_in(2));
  if (!returns(outcomes,
               [&] { percov2::cdf_table(logits, rows, sizes.prob_bits, threads, cdf.data()); })) {
    PERCOV2_PROMISE(hostile);
    return;
  }
  with_other_sets([&] {
    Fenced<std::int32_t> other(cdf.size(), random.one_in(2));
    percov2::cdf_table(logits, rows, sizes.prob_bits, threads, other.data());
    PERCOV2_PROMISE(std::equal(cdf.data(), cdf.data() + cdf.size(), other.data()));
  });
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int32_t* line = cdf.data() + r * (codebook + 1);
    PERCOV2_PROMISE(line[0] == 0 && line[codebook] == 1 << sizes.prob_bits);
    for (std::int64_t i = 0; i < codebook; ++i) PERCOV2_PROMISE(line[i] < line[i + 1]);
    const auto plain_line = plain::cdf(rows_of.line(r), codebook, sizes.prob_bits);
    PERCOV2_PROMISE(std::equal(plain_line.begin(), plain_line.end(), line));
    if (done) {
      PERCOV2_PROMISE(starts[r] == line[symbols[r]]);
      PERCOV2_PROMISE(starts[r] + freqs[r] == line[symbols[r] + 1]);
    }
  }
}

}  // namespace percov2_test
