// check_cuda [<effort> [<seed> [<omitted barrier>]]]: the CUDA kernels, run by the emulation in
// several orders, give the bytes and symbols of the CPU's coder. Prints one line for each subject;
// exits with 1 if anything differs. With a barrier omitted something must differ, or be reported by
// ThreadSanitizer.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "check.h"
#include "coder/coder.h"
#include "coder/reciprocal.h"
#include "cuda/coder_cuda.h"
#include "cuda_emulation.h"
#include "random_input.h"
#include "streams.h"

namespace percov2_test {
namespace {

const percov2::CudaQueue kQueue = {0, nullptr};

struct Subjects {
  Subject quotients{"quotients"}, lengths{"offsets"}, bytes{"encoder bytes"}, quiet{"quiet counts"};
  Subject encoded{"encoder status"}, symbols{"decoded symbols"}, states{"decoder states"};
  Subject decoded{"decoder status"}, launches{"launches"};

  bool report() const {
    bool equal = true;
    for (const Subject* s :
         {&quotients, &lengths, &bytes, &quiet, &encoded, &symbols, &states, &decoded, &launches}) {
      equal = s->report() && equal;
    }
    return equal;
  }
};

// For every divisor: the multiplier is the quotient rounded up, and the states where a wrong
// quotient would show first are divided rightly.
void check_quotients(Random& random, std::uint32_t stride, Subject& subject) {
  for (std::uint32_t freq = 1; freq <= 1u << 20; freq += freq < 4096 ? 1 : stride) {
    const percov2::Reciprocal by = percov2::reciprocal(freq);
    const std::uint64_t power = std::uint64_t{1} << (31 + by.shift);
    const std::uint64_t expected_multiplier = (power + freq - 1) / freq;
    std::uint32_t got[6], expected[6];
    const std::uint32_t last = percov2::kStateEnd - 1;
    const std::uint32_t multiple =
        freq * static_cast<std::uint32_t>(random.between(1, last / freq));
    const std::uint32_t xs[] = {
        last,     last / freq * freq, last / freq * freq - 1,
        multiple, multiple - 1,       static_cast<std::uint32_t>(random.between(0, last))};
    for (int i = 0; i < 6; ++i) {
      got[i] = percov2::quotient(xs[i], by);
      expected[i] = xs[i] / freq;
    }
    const bool right = by.multiplier == expected_multiplier && (1u << by.shift) >= freq;
    subject.compare(got, expected, right ? 6 : 0, freq, 31);
    const int one = 1, is_right = right;
    subject.compare(&is_right, &one, 1, freq, 31);
  }
}

std::int64_t some_symbols(Random& random) {
  return random.one_in(2) ? random.pick({0, 1, 2, 31, 32, 33, 63, 64, 65, 96, 97})
                          : random.between(0, 150);
}

// One encoding: intervals, padded to a rectangle, of streams of any length.
struct Input {
  std::int64_t streams, symbols;
  int prob_bits;
  std::vector<std::int32_t> starts, freqs, counts, checks;
  std::vector<std::int32_t> status;  // expected

  explicit Input(Random& random)
      : streams(random.pick({0, 1, 2, 3, 4, 5, 9})),
        symbols(some_symbols(random)),
        prob_bits(static_cast<int>(random.between(8, 20))) {
    const std::int32_t all = 1 << prob_bits;
    const std::int64_t kind = random.between(0, 3);
    for (std::int64_t i = 0; i < streams * symbols; ++i) {
      std::int64_t freq = random.between(1, all);
      if (kind == 0) freq = random.pick({1, 2, 3, all, all - 1, all / 2});
      if (kind == 1) freq = random.between(1, std::min(all, 300));
      if (kind == 2) freq = all - random.between(0, 3);  // next to nothing is emitted
      freqs.push_back(static_cast<std::int32_t>(freq));
      starts.push_back(static_cast<std::int32_t>(random.one_in(4) ? random.pick({0, all - freq})
                                                                  : random.between(0, all - freq)));
    }
    for (std::int64_t b = 0; b < streams; ++b) {
      checks.push_back(static_cast<std::int32_t>(random.one_in(4) ? random.pick({0, 1, 255, 65535})
                                                                  : random.between(0, 65535)));
      counts.push_back(static_cast<std::int32_t>(random.one_in(3) ? random.pick({0, symbols})
                                                                  : random.between(0, symbols)));
    }
    status.assign(checks.size(), percov2::kOk);
  }
  // Makes some streams wrong in one way each.
  void spoil(Random& random) {
    for (std::int64_t b = 0; b < streams; ++b) {
      const auto at = static_cast<std::size_t>(b);
      if (random.one_in(2)) continue;
      const std::int64_t way = random.between(0, 2);
      if (way == 0) {
        checks[at] = static_cast<std::int32_t>(random.pick({-1, 65536, INT32_MIN, INT32_MAX}));
        status[at] = percov2::kBadCheck;
      } else if (way == 1) {
        counts[at] = static_cast<std::int32_t>(
            random.pick({-1, symbols + 1, INT32_MIN, INT32_MAX, INT32_MAX - 1}));
        status[at] = percov2::kBadCount;
      } else if (counts[at] > 0) {
        const auto which =
            static_cast<std::size_t>(b * symbols + random.between(0, counts[at] - 1));
        const std::int32_t all = 1 << prob_bits;
        if (random.one_in(2)) {
          freqs[which] = static_cast<std::int32_t>(
              random.pick({0, -1, INT32_MIN, INT32_MAX, all + 1, all - starts[which] + 1}));
        } else {
          starts[which] = static_cast<std::int32_t>(
              random.pick({-1, INT32_MIN, INT32_MAX, all - freqs[which] + 1}));
        }
        status[at] = percov2::kBadInterval;
      }
    }
  }
};

// The streams that the CPU makes of the good streams of an input; bad ones are empty.
struct Output {
  std::vector<std::uint8_t> bytes;
  std::vector<std::int64_t> offsets;
  std::vector<std::int64_t> quiet;

  Output(const Input& in, bool ragged) : offsets(1, 0) {
    for (std::int64_t b = 0; b < in.streams; ++b) {
      const auto at = static_cast<std::size_t>(b);
      if (in.status[at] == percov2::kOk) {
        percov2::BatchEncoder encoder({static_cast<std::uint32_t>(in.checks[at])});
        const std::int64_t count = ragged ? in.counts[at] : in.symbols;
        encoder.push(in.starts.data() + b * in.symbols, in.freqs.data() + b * in.symbols, count,
                     &count, in.prob_bits, 1);
        std::vector<std::uint8_t> stream;
        std::vector<std::int64_t> ends;
        finish(encoder, stream, ends);
        bytes.insert(bytes.end(), stream.begin(), stream.end());
        quiet.push_back(encoder.symbols_before_output()[0]);
      } else {
        quiet.push_back(0);
      }
      offsets.push_back(static_cast<std::int64_t>(bytes.size()));
    }
  }
};

void check_encoding(Random& random, bool spoiled, Subjects& subjects) {
  Input in(random);
  if (spoiled) in.spoil(random);
  const bool ragged = spoiled || random.one_in(2);
  const Output expected(in, ragged);
  const auto streams = static_cast<std::size_t>(in.streams);
  const std::int64_t most = percov2::packed_most_bytes(in.streams, in.symbols);
  const std::int64_t needed = expected.offsets.back();
  const std::int64_t capacity =
      random.one_in(3) ? most : random.pick({needed, needed, random.between(0, needed)});
  std::vector<std::uint8_t> scratch(
      static_cast<std::size_t>(percov2::encode_scratch_bytes(in.streams, in.symbols)), 0xEE);
  const std::int64_t head_bytes = percov2::packed_head_bytes(in.streams);
  std::vector<std::uint8_t> packed(static_cast<std::size_t>(head_bytes + capacity), 0xEE);
  const percov2::EncodeTask task = {in.streams,       in.symbols,
                                    in.prob_bits,     in.starts.data(),
                                    in.freqs.data(),  ragged ? in.counts.data() : nullptr,
                                    in.checks.data(), scratch.data(),
                                    packed.data(),    capacity};
  const std::int64_t launches = percov2_emulation::launch_count();
  percov2::encode_streams(task, kQueue);
  const std::int64_t used = percov2_emulation::launch_count() - launches;
  const std::int64_t allowed = in.streams > 0 ? 2 : 1;
  subjects.launches.compare(&used, &allowed, 1, in.streams, in.symbols);

  const percov2::PackedHead head = percov2::packed_head(packed.data(), in.streams);
  std::vector<std::int32_t> status = in.status;
  std::vector<std::uint8_t> bytes(static_cast<std::size_t>(capacity), 0xEE);
  for (std::size_t b = 0; b < streams; ++b) {
    const std::int64_t begin = expected.offsets[b], end = expected.offsets[b + 1];
    if (end > capacity && end > begin) {
      status[b] = percov2::kBufferFull;
    } else {
      std::copy(expected.bytes.begin() + begin, expected.bytes.begin() + end,
                bytes.begin() + begin);
    }
  }
  subjects.lengths.compare(head.offsets, expected.offsets.data(), in.streams + 1, in.symbols,
                           in.prob_bits);
  subjects.encoded.compare(head.status, status.data(), in.streams, in.symbols, in.prob_bits);
  subjects.quiet.compare(head.quiet, expected.quiet.data(), in.streams, in.symbols, in.prob_bits);
  // Also what lies between and behind the streams: nobody has written there.
  subjects.bytes.compare(packed.data() + head_bytes, bytes.data(), capacity, in.symbols,
                         in.prob_bits);
}

// Streams to decode, and where the CPU's decoder arrives.
void check_decoding(Random& random, std::int64_t most_logits, Subjects& subjects) {
  const Sizes sizes = random_sizes(random);
  const std::int64_t codebook = sizes.codebook;
  const std::int64_t streams = random.pick({0, 1, 2, 3, 4, 5, 9});
  const std::int64_t room = std::max<std::int64_t>(most_logits / (codebook * (streams + 1)), 1);
  const std::int64_t symbols =
      random.one_in(12) ? 0 : random.between(1, std::min<std::int64_t>(room, 12));
  const bool unequal = random.one_in(2);  // streams decode different numbers of symbols
  std::vector<std::int64_t> first(1, 0);  // row of each stream
  for (std::int64_t b = 0; b < streams; ++b) {
    first.push_back(first.back() + (unequal ? random.between(0, symbols) : symbols));
  }
  const std::int64_t rows = first.back();
  const std::int64_t shift = random.one_in(4) ? 1 : 0;  // rows that begin anywhere
  std::vector<std::int16_t> logits(static_cast<std::size_t>(shift + rows * codebook));
  for (std::int64_t r = 0; r < rows; ++r) {
    fill_logits(random, logits.data() + shift + r * codebook, codebook);
  }
  std::vector<std::uint8_t> bytes;
  std::vector<std::int64_t> offsets(1, 0);
  for (std::int64_t b = 0; b < streams; ++b) {
    const std::int64_t begin = first[static_cast<std::size_t>(b)];
    const std::int64_t count = first[static_cast<std::size_t>(b) + 1] - begin;
    if (random.one_in(2)) {  // a stream of these symbols
      std::vector<std::int32_t> starts(static_cast<std::size_t>(count)), freqs = starts;
      for (std::int64_t i = 0; i < count; ++i) {
        const auto symbol = static_cast<std::int32_t>(
            random.one_in(2) ? random.pick({0, codebook - 1}) : random.between(0, codebook - 1));
        const percov2::Logits row =
            percov2::int16_logits(logits.data() + shift + (begin + i) * codebook, codebook);
        percov2::intervals(row, &symbol, 1, sizes.prob_bits, 1, starts.data() + i,
                           freqs.data() + i);
      }
      percov2::BatchEncoder encoder({static_cast<std::uint32_t>(random.between(0, 65535))});
      encoder.push(starts.data(), freqs.data(), count, &count, sizes.prob_bits, 1);
      std::vector<std::uint8_t> stream;
      std::vector<std::int64_t> ends;
      finish(encoder, stream, ends);
      bytes.insert(bytes.end(), stream.begin(), stream.end());
    }
    for (std::int64_t i = random.one_in(2) ? random.between(0, 3 * symbols) : 0; i > 0; --i) {
      bytes.push_back(static_cast<std::uint8_t>(random.bits()));
    }
    offsets.push_back(static_cast<std::int64_t>(bytes.size()));
  }

  std::vector<std::int64_t> numbers, positions(static_cast<std::size_t>(streams), 0);
  std::vector<std::uint32_t> begun(positions.size(), 0);
  for (std::int64_t b = 0; b < streams; ++b) {
    numbers.push_back(b);
    if (random.one_in(4)) {  // resumed somewhere
      begun[static_cast<std::size_t>(b)] = static_cast<std::uint32_t>(random.between(0, INT32_MAX));
      positions[static_cast<std::size_t>(b)] = random.between(
          0, offsets[static_cast<std::size_t>(b) + 1] - offsets[static_cast<std::size_t>(b)]);
    }
  }
  std::vector<std::int32_t> expected(static_cast<std::size_t>(rows));
  percov2::BatchDecoder decoder(bytes, offsets, true, begun, positions);
  for (const std::int64_t b : numbers) {
    const std::int64_t begin = first[static_cast<std::size_t>(b)];
    decoder.decode_logits(percov2::int16_logits(logits.data() + shift + begin * codebook, codebook),
                          &b, 1, first[static_cast<std::size_t>(b) + 1] - begin, sizes.prob_bits, 1,
                          expected.data() + begin);
  }
  std::vector<std::int64_t> expected_states(decoder.states().begin(), decoder.states().end());
  std::vector<std::int64_t> expected_positions = decoder.positions();

  std::vector<std::int32_t> states(begun.begin(), begun.end()), status(positions.size(), -1);
  std::vector<std::int32_t> decoded(expected.size(), -1), expected_status(positions.size(), 0);
  std::vector<std::int64_t> hostile = offsets, hostile_rows = first;
  for (std::size_t b = 0; b < positions.size() && random.one_in(3); ++b) {
    if (random.one_in(2)) continue;
    std::int64_t decodes = first[b + 1] - first[b];
    switch (random.between(0, unequal ? 3 : 2)) {
      case 0:
        states[b] = static_cast<std::int32_t>(random.pick({-1, INT32_MIN}));
        expected_status[b] = percov2::kBadState;
        break;
      case 1:
        positions[b] = random.pick({-1, offsets[b + 1] - offsets[b] + 1, INT64_MIN, INT64_MAX});
        expected_status[b] = percov2::kBadPosition;
        break;
      case 2:  // the last stream's end, which no other stream has
        if (b + 1 != positions.size()) break;
        hostile[b + 1] = random.pick({-1, INT64_MIN, offsets[b + 1] + 1, INT64_MAX});
        expected_status[b] = percov2::kBadOffsets;
        break;
      default:
        if (b + 1 != positions.size()) break;
        hostile_rows[b + 1] = random.pick({-1, INT64_MIN, rows + 1, INT64_MAX});
        expected_status[b] = percov2::kBadRows;
        std::fill_n(expected.begin() + first[b], decodes, -1);
        decodes = 0;
    }
    if (expected_status[b] == percov2::kOk) continue;
    std::fill_n(expected.begin() + first[b], decodes, 0);
    expected_states[b] = states[b];
    expected_positions[b] = positions[b];
  }
  const percov2::DecodeTask task = {streams,
                                    unequal ? rows : symbols,
                                    codebook,
                                    sizes.prob_bits,
                                    unequal ? hostile_rows.data() : nullptr,
                                    logits.data() + shift,
                                    bytes.data(),
                                    static_cast<std::int64_t>(bytes.size()),
                                    hostile.data(),
                                    states.data(),
                                    positions.data(),
                                    decoded.data(),
                                    status.data()};
  percov2::decode_stage(task, kQueue);
  subjects.symbols.compare(decoded.data(), expected.data(), rows, codebook, sizes.prob_bits);
  subjects.states.compare(states.data(), expected_states.data(), streams, codebook,
                          sizes.prob_bits);
  subjects.states.compare(positions.data(), expected_positions.data(), streams, codebook,
                          sizes.prob_bits);
  subjects.decoded.compare(status.data(), expected_status.data(), streams, codebook,
                           sizes.prob_bits);
}

}  // namespace
}  // namespace percov2_test

int main(int argc, char** argv) {
  const std::int64_t effort = argc > 1 ? std::atoll(argv[1]) : 10;
  const std::uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  const int omitted = argc > 3 ? std::atoi(argv[3]) : -1;
  using percov2_emulation::Order;
  percov2_test::Subjects subjects;
  percov2_test::Random random(seed);
  percov2_test::check_quotients(random, effort < 10 ? 97 : 1, subjects.quotients);
  constexpr Order kOrders[] = {Order::kForward, Order::kReverse, Order::kRandom};
  for (std::int64_t n = 0; n < 12 * effort; ++n) {
    percov2_test::Random case_random(seed * 1000003 + static_cast<std::uint64_t>(n));
    percov2_emulation::configure(kOrders[n % 3], case_random.bits(), omitted);
    percov2_test::check_encoding(case_random, n % 4 == 3, subjects);
    percov2_test::check_decoding(case_random, 20000, subjects);
  }
  const bool equal = subjects.report();
  std::printf("%lld launches, %lld meetings of threads, %d barriers:",
              static_cast<long long>(percov2_emulation::launch_count()),
              static_cast<long long>(percov2_emulation::meeting_count()),
              percov2_emulation::barrier_count());
  for (int i = 0; i < percov2_emulation::barrier_count(); ++i) {
    std::printf(" %s", percov2_emulation::barrier_place(i));
  }
  std::printf("\n");
  return equal ? 0 : 1;
}
