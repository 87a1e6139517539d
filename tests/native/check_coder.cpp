// Intervals, tables, encoder and decoder of every instruction set against plain_coder.h.

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "check.h"
#include "coder/coder.h"
#include "plain_coder.h"
#include "random_input.h"
#include "random_logits.h"
#include "streams.h"

namespace percov2_test {
namespace {

// Rows of logits of one size with their tables, and streams that say random symbols of them.
struct Case {
  Sizes sizes;
  std::int64_t rows, count;                       // row r is stream r, with `count` symbols
  RandomLogits logits;                            // [rows, count, codebook]
  std::vector<std::vector<std::int64_t>> tables;  // [rows * count][codebook + 1]
  std::vector<std::int32_t> symbols, starts, freqs;
  std::vector<std::uint32_t> checks;
  std::vector<std::uint8_t> bytes;
  std::vector<std::int64_t> offsets;

  Case(Random& random, Sizes of, std::int64_t row_count, std::int64_t symbol_count)
      : sizes(of),
        rows(row_count),
        count(symbol_count),
        logits(random, row_count * symbol_count, of.codebook) {
    for (std::int64_t i = 0; i < rows * count; ++i) {
      tables.push_back(plain::cdf(logits.line(i), sizes.codebook, sizes.prob_bits));
      const std::int64_t symbol =
          random.one_in(3)
              ? plain::find(tables.back(), random.between(0, (1 << sizes.prob_bits) - 1))
              : random.pick({0, sizes.codebook - 1, random.between(0, sizes.codebook - 1)});
      symbols.push_back(static_cast<std::int32_t>(symbol));
      const auto at = static_cast<std::size_t>(symbol);
      starts.push_back(static_cast<std::int32_t>(tables.back()[at]));
      freqs.push_back(static_cast<std::int32_t>(tables.back()[at + 1] - tables.back()[at]));
    }
    offsets.push_back(0);
    for (std::int64_t r = 0; r < rows; ++r) {
      std::vector<plain::Interval> said;
      for (std::int64_t i = r * count; i < (r + 1) * count; ++i) {
        const auto at = static_cast<std::size_t>(i);
        said.push_back({starts[at], freqs[at], sizes.prob_bits});
      }
      checks.push_back(static_cast<std::uint32_t>(random.between(0, 65535)));
      const auto stream = plain::encode(checks.back(), said);
      bytes.insert(bytes.end(), stream.begin(), stream.end());
      offsets.push_back(static_cast<std::int64_t>(bytes.size()));
    }
  }
};

struct Subjects {
  Subject intervals{"intervals"}, tables{"cdf tables"}, encoder{"encoder bytes"};
  Subject from_logits{"decoding from logits"}, from_tables{"decoding from tables"};
  Subject states{"decoder states"}, refused{"refused rows"};

  bool report() const {
    bool equal = true;
    for (const Subject* s :
         {&intervals, &tables, &encoder, &from_logits, &from_tables, &states, &refused}) {
      equal = s->report() && equal;
    }
    return equal;
  }
};

// `bytes` and `offsets`: the case's own streams, or rubbish of the same number.
void check_decoding(const Case& c, const std::vector<std::uint8_t>& bytes,
                    const std::vector<std::int64_t>& offsets, const Fenced<std::int32_t>& cdf,
                    int threads, Subjects& subjects, const std::vector<percov2::Isa>& sets) {
  std::vector<std::int32_t> expected;
  std::vector<std::int64_t> states, positions, streams;
  for (std::int64_t r = 0; r < c.rows; ++r) {
    const auto row = static_cast<std::size_t>(r);
    plain::Reader reader(
        std::vector<std::uint8_t>(bytes.begin() + offsets[row], bytes.begin() + offsets[row + 1]));
    for (std::int64_t i = r * c.count; i < (r + 1) * c.count; ++i) {
      expected.push_back(static_cast<std::int32_t>(
          reader.decode(c.tables[static_cast<std::size_t>(i)], c.sizes.prob_bits)));
    }
    states.push_back(reader.x);
    positions.push_back(static_cast<std::int64_t>(reader.next));
    streams.push_back(r);
  }
  const auto [codebook, prob_bits] = c.sizes;
  for (const percov2::Isa isa : sets) {
    percov2::use_isa(isa);
    Fenced<std::int32_t> symbols(c.rows * c.count);
    percov2::BatchDecoder decoder(bytes, offsets, false, {}, {});
    percov2::BatchDecoder other = decoder;
    decoder.decode_logits(c.logits.view(), streams.data(), c.rows, c.count, prob_bits, threads,
                          symbols.data());
    subjects.from_logits.compare(symbols.data(), expected.data(), symbols.size(), codebook,
                                 prob_bits);
    other.decode_cdf(cdf.data(), streams.data(), c.rows, c.count, codebook, prob_bits, threads,
                     symbols.data());
    subjects.from_tables.compare(symbols.data(), expected.data(), symbols.size(), codebook,
                                 prob_bits);
    for (const auto* d : {&decoder, &other}) {
      subjects.states.compare(d->states().data(), states.data(), c.rows, codebook, prob_bits);
      subjects.states.compare(d->positions().data(), positions.data(), c.rows, codebook, prob_bits);
    }
  }
}

void check_case(Random& random, const Case& c, Subjects& subjects,
                const std::vector<percov2::Isa>& sets) {
  const auto [codebook, prob_bits] = c.sizes;
  const std::int64_t total = c.rows * c.count;
  const int threads = random.one_in(4) ? 3 : 1;
  Fenced<std::int32_t> symbols(total);
  std::copy(c.symbols.begin(), c.symbols.end(), symbols.data());
  Fenced<std::int32_t> expected_cdf(total * (codebook + 1));
  for (std::int64_t i = 0; i < total; ++i) {
    const auto& table = c.tables[static_cast<std::size_t>(i)];
    std::copy(table.begin(), table.end(), expected_cdf.data() + i * (codebook + 1));
  }
  for (const percov2::Isa isa : sets) {
    percov2::use_isa(isa);
    Fenced<std::int32_t> starts(total, random.one_in(2)), freqs(total, random.one_in(2));
    percov2::intervals(c.logits.view(), symbols.data(), total, prob_bits, threads, starts.data(),
                       freqs.data());
    subjects.intervals.compare(starts.data(), c.starts.data(), total, codebook, prob_bits);
    subjects.intervals.compare(freqs.data(), c.freqs.data(), total, codebook, prob_bits);
    Fenced<std::int32_t> cdf(total * (codebook + 1), random.one_in(2));
    percov2::cdf_table(c.logits.view(), total, prob_bits, threads, cdf.data());
    subjects.tables.compare(cdf.data(), expected_cdf.data(), cdf.size(), codebook, prob_bits);

    percov2::BatchEncoder encoder(c.checks);
    const std::vector<std::int64_t> counts(c.checks.size(), c.count);
    encoder.push(starts.data(), freqs.data(), total, counts.data(), prob_bits, threads);
    std::vector<std::uint8_t> buffer;
    std::vector<std::int64_t> offsets;
    finish(encoder, buffer, offsets);
    subjects.encoder.compare(offsets.data(), c.offsets.data(), c.rows + 1, codebook, prob_bits);
    if (buffer.size() == c.bytes.size()) {
      subjects.encoder.compare(buffer.data(), c.bytes.data(),
                               static_cast<std::int64_t>(buffer.size()), codebook, prob_bits);
    }
  }
  check_decoding(c, c.bytes, c.offsets, expected_cdf, threads, subjects, sets);
  std::vector<std::uint8_t> rubbish = c.bytes;
  for (auto& value : rubbish) value = static_cast<std::uint8_t>(random.bits());
  check_decoding(c, rubbish, c.offsets, expected_cdf, threads, subjects, sets);
}

// Rows with a NaN, an infinity or nothing finite are refused, and no others.
void check_refusals(Random& random, Sizes sizes, Subject& subject,
                    const std::vector<percov2::Isa>& sets) {
  const RandomLogits row(random, 1, sizes.codebook, true);
  const std::int32_t symbol = 0, expected = row.valid();
  for (const percov2::Isa isa : sets) {
    percov2::use_isa(isa);
    std::int32_t start, freq, taken = 1;
    try {
      percov2::intervals(row.view(), &symbol, 1, sizes.prob_bits, 1, &start, &freq);
    } catch (const std::invalid_argument&) {
      taken = 0;
    }
    subject.compare(&taken, &expected, 1, sizes.codebook, sizes.prob_bits);
  }
}

}  // namespace

bool check_coder(std::int64_t effort, std::uint64_t seed) {
  const auto sets = instruction_sets();
  Subjects subjects;
  for (std::int64_t n = 0; n < 40 * effort; ++n) {
    Random random(seed * 1000003 + static_cast<std::uint64_t>(n));
    Sizes sizes = random_sizes(random);
    if (n % 2 == 0) {  // every small size: the ragged ends of every vector width
      sizes.codebook = 2 + n / 2 % 140;
      sizes.prob_bits = static_cast<int>(random.between(sizes.codebook > 128 ? 9 : 8, 20));
    }
    const std::int64_t rows = random.pick({1, 2, 3, 7, 8, 9, 17});
    const std::int64_t most = std::max<std::int64_t>(20000 / (rows * sizes.codebook), 1);
    const std::int64_t count = random.between(1, std::min<std::int64_t>(most, 24));
    check_case(random, Case(random, sizes, rows, count), subjects, sets);
    for (int i = 0; i < 4; ++i) check_refusals(random, sizes, subjects.refused, sets);
  }
  return subjects.report();
}

}  // namespace percov2_test
