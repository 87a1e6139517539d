// Fuzzing of intervals, encoder and decoder: valid streams, damaged streams, hostile arguments.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "coder/coder.h"
#include "fuzz.h"
#include "plain_coder.h"
#include "random_logits.h"
#include "streams.h"
#include "support/isa.h"

namespace percov2_test {
namespace {

using percov2::BatchDecoder;
using percov2::BatchEncoder;

// Symbols of all streams that share a codebook: logits [rows, count, codebook].
struct Segment {
  Sizes sizes;
  std::int64_t count;
  std::unique_ptr<RandomLogits> logits;
  std::vector<std::int32_t> symbols;  // [rows, count]
};

// Streams and what they say. Row r of every segment belongs to stream streams[r].
struct Message {
  std::vector<std::int64_t> streams;
  std::vector<std::uint32_t> checks;
  std::vector<Segment> segments;
  std::vector<std::uint8_t> buffer;
  std::vector<std::int64_t> offsets;

  std::int64_t rows() const { return static_cast<std::int64_t>(streams.size()); }
};

// The segment's intervals in the order of streams, which is the encoder's.
void push(const Message& message, const Segment& segment, int threads, BatchEncoder& encoder) {
  const std::int64_t total = message.rows() * segment.count;
  Fenced<std::int32_t> starts(total), freqs(total);
  percov2::intervals(segment.logits->view(), segment.symbols.data(), total, segment.sizes.prob_bits,
                     threads, starts.data(), freqs.data());
  Fenced<std::int32_t> ordered_starts(total), ordered_freqs(total);
  for (std::int64_t r = 0; r < message.rows(); ++r) {
    const std::int64_t at = message.streams[static_cast<std::size_t>(r)] * segment.count;
    std::copy_n(starts.data() + r * segment.count, segment.count, ordered_starts.data() + at);
    std::copy_n(freqs.data() + r * segment.count, segment.count, ordered_freqs.data() + at);
  }
  const std::vector<std::int64_t> counts(message.streams.size(), segment.count);
  encoder.push(ordered_starts.data(), ordered_freqs.data(), total, counts.data(),
               segment.sizes.prob_bits, threads);
}

Message random_message(Random& random) {
  Message message;
  const std::int64_t rows = random.one_in(4) ? random.between(8, 40) : random.between(1, 9);
  message.streams.resize(static_cast<std::size_t>(rows));
  std::iota(message.streams.begin(), message.streams.end(), 0);
  for (std::size_t i = message.streams.size(); i-- > 1;) {
    std::swap(message.streams[i],
              message.streams[static_cast<std::size_t>(random.between(0, static_cast<int>(i)))]);
  }
  for (std::int64_t b = 0; b < rows; ++b) {
    message.checks.push_back(static_cast<std::uint32_t>(
        random.one_in(4) ? random.pick({0, 1, 255, 65535}) : random.between(0, 65535)));
  }
  const std::int64_t segments = random.between(1, 3);
  for (std::int64_t n = 0; n < segments; ++n) {
    Segment segment{};
    segment.sizes = random_sizes(random);
    // So that a case stays short.
    const std::int64_t budget = random.one_in(8) ? 65536 : 8192;
    const std::int64_t most = std::max<std::int64_t>(budget / (rows * segment.sizes.codebook), 1);
    segment.count = random.between(random.one_in(20) ? 0 : 1, std::min<std::int64_t>(most, 40));
    const std::int64_t total = rows * segment.count;
    segment.logits = std::make_unique<RandomLogits>(random, total, segment.sizes.codebook);
    for (std::int64_t i = 0; i < total; ++i) {
      const std::int16_t* line = segment.logits->line(i);
      std::int64_t symbol = random.between(0, segment.sizes.codebook - 1);
      if (random.one_in(2)) symbol = std::max_element(line, line + segment.sizes.codebook) - line;
      if (random.one_in(16)) symbol = random.pick({0, segment.sizes.codebook - 1});
      segment.symbols.push_back(static_cast<std::int32_t>(symbol));
    }
    message.segments.push_back(std::move(segment));
  }
  BatchEncoder encoder(message.checks);
  for (auto s = message.segments.rbegin(); s != message.segments.rend(); ++s) {
    push(message, *s, random_threads(random), encoder);
  }
  finish(encoder, message.buffer, message.offsets);
  return message;
}

// Symbols of one segment, from logits or from tables.
std::vector<std::int32_t> decode(BatchDecoder& decoder, const Message& message,
                                 const Segment& segment, bool from_tables, int threads) {
  const std::int64_t total = message.rows() * segment.count;
  const auto [codebook, prob_bits] = segment.sizes;
  Fenced<std::int32_t> symbols(total);
  if (from_tables) {
    Fenced<std::int32_t> cdf(total * (codebook + 1));
    percov2::cdf_table(segment.logits->view(), total, prob_bits, threads, cdf.data());
    decoder.decode_cdf(cdf.data(), message.streams.data(), message.rows(), segment.count, codebook,
                       prob_bits, /*trusted=*/(total % 2) == 0, threads, symbols.data());
  } else {
    decoder.decode_logits(segment.logits->view(), message.streams.data(), message.rows(),
                          segment.count, prob_bits, threads, symbols.data());
  }
  for (std::int64_t i = 0; i < total; ++i) {
    PERCOV2_PROMISE(symbols[i] >= 0 && symbols[i] < codebook);
  }
  return std::vector<std::int32_t>(symbols.data(), symbols.data() + total);
}

void check_decoder(const BatchDecoder& decoder, const std::vector<std::int64_t>& offsets) {
  const std::vector<std::int64_t> positions = decoder.positions();
  for (std::size_t b = 0; b + 1 < offsets.size(); ++b) {
    PERCOV2_PROMISE(decoder.states()[b] < percov2::kStateEnd);
    PERCOV2_PROMISE(positions[b] >= 0 && positions[b] <= offsets[b + 1] - offsets[b]);
    PERCOV2_PROMISE(!decoder.exhausted(static_cast<std::int64_t>(b)) ||
                    positions[b] == offsets[b + 1] - offsets[b]);
  }
}

// The stream of row 0, decoded by the plain statement: what it says is what the batch says.
void compare_with_plain(const Message& message,
                        const std::vector<std::vector<std::int32_t>>& decoded,
                        const BatchDecoder& decoder) {
  const auto stream = static_cast<std::size_t>(message.streams[0]);
  plain::Reader reader(std::vector<std::uint8_t>(
      message.buffer.begin() + static_cast<std::ptrdiff_t>(message.offsets[stream]),
      message.buffer.begin() + static_cast<std::ptrdiff_t>(message.offsets[stream + 1])));
  for (std::size_t n = 0; n < message.segments.size(); ++n) {
    const Segment& segment = message.segments[n];
    for (std::int64_t i = 0; i < segment.count; ++i) {
      const auto cdf =
          plain::cdf(segment.logits->line(i), segment.sizes.codebook, segment.sizes.prob_bits);
      PERCOV2_PROMISE(reader.decode(cdf, segment.sizes.prob_bits) ==
                      decoded[n][static_cast<std::size_t>(i)]);
    }
  }
  PERCOV2_PROMISE(reader.x == decoder.states()[stream]);
  PERCOV2_PROMISE(static_cast<std::int64_t>(reader.next) == decoder.positions()[stream]);
}

// Bit flips, cuts, insertions, splices and rubbish; offsets stay in order.
void damage(Random& random, Message& message) {
  std::vector<std::vector<std::uint8_t>> streams;
  for (std::size_t b = 0; b + 1 < message.offsets.size(); ++b) {
    streams.emplace_back(
        message.buffer.begin() + static_cast<std::ptrdiff_t>(message.offsets[b]),
        message.buffer.begin() + static_cast<std::ptrdiff_t>(message.offsets[b + 1]));
  }
  const auto byte = [&] {
    return static_cast<std::uint8_t>(random.pick({0, 255, random.between(0, 255)}));
  };
  const auto cut = [&](const std::vector<std::uint8_t>& s) {
    return static_cast<std::ptrdiff_t>(random.between(0, static_cast<std::int64_t>(s.size())));
  };
  for (std::int64_t n = random.between(1, 4); n > 0; --n) {
    auto& stream = streams[static_cast<std::size_t>(
        random.between(0, static_cast<std::int64_t>(streams.size()) - 1))];
    const auto& other = streams[static_cast<std::size_t>(
        random.between(0, static_cast<std::int64_t>(streams.size()) - 1))];
    switch (random.between(0, 5)) {
      case 0:
        for (std::int64_t flips = random.between(1, 8); flips > 0 && !stream.empty(); --flips) {
          const auto bit = random.between(0, 8 * static_cast<std::int64_t>(stream.size()) - 1);
          stream[static_cast<std::size_t>(bit / 8)] ^= static_cast<std::uint8_t>(1 << bit % 8);
        }
        break;
      case 1:
        stream.resize(static_cast<std::size_t>(cut(stream)));
        break;
      case 2:
        stream.insert(stream.begin() + cut(stream), byte());
        break;
      case 3: {
        std::vector<std::uint8_t> spliced(stream.begin(), stream.begin() + cut(stream));
        spliced.insert(spliced.end(), other.begin() + cut(other), other.end());
        stream = std::move(spliced);
        break;
      }
      case 4:
        stream.erase(stream.begin(), stream.begin() + cut(stream));
        break;
      default:
        for (auto& value : stream) value = byte();
    }
  }
  message.buffer.clear();
  message.offsets.assign(1, 0);
  for (const auto& stream : streams) {
    message.buffer.insert(message.buffer.end(), stream.begin(), stream.end());
    message.offsets.push_back(static_cast<std::int64_t>(message.buffer.size()));
  }
}

}  // namespace

void fuzz_streams(Random& random, Outcomes& outcomes) {
  Message message = random_message(random);
  const bool damaged = random.one_in(2);
  if (damaged) damage(random, message);
  BatchDecoder decoder(message.buffer, message.offsets, false, {}, {});
  std::vector<std::vector<std::int32_t>> decoded;
  for (const Segment& segment : message.segments) {
    const BatchDecoder before = decoder;
    const bool from_tables = random.one_in(4);
    decoded.push_back(decode(decoder, message, segment, from_tables, random_threads(random)));
    PERCOV2_PROMISE(damaged || decoded.back() == segment.symbols);
    check_decoder(decoder, message.offsets);
    with_other_sets([&] {
      BatchDecoder other = before;
      PERCOV2_PROMISE(decode(other, message, segment, !from_tables, 1) == decoded.back());
      PERCOV2_PROMISE(other.states() == decoder.states());
      PERCOV2_PROMISE(other.positions() == decoder.positions());
    });
    if (!damaged && random.one_in(2)) {  // somebody else goes on
      decoder = BatchDecoder(message.buffer, message.offsets, true, decoder.states(),
                             decoder.positions());
    }
    ++outcomes.accepted;
  }
  for (std::int64_t b = 0; b < message.rows(); ++b) {
    const std::uint32_t check = message.checks[static_cast<std::size_t>(b)];
    const bool finished = decoder.finished(b, check);
    if (!finished) ++outcomes.refused;
    PERCOV2_PROMISE(damaged || finished);
    PERCOV2_PROMISE(!finished || !decoder.finished(b, check ^ 1u));
  }
  compare_with_plain(message, decoded, decoder);
}

void fuzz_decoder_arguments(Random& random, Outcomes& outcomes) {
  std::vector<std::uint8_t> buffer(static_cast<std::size_t>(random.size(0, 300)));
  for (auto& value : buffer) {
    value = static_cast<std::uint8_t>(random.one_in(3) ? random.pick({0, 255}) : random.bits());
  }
  const auto length = static_cast<std::int64_t>(buffer.size());
  std::vector<std::int64_t> offsets(static_cast<std::size_t>(random.between(0, 7)));
  for (auto& offset : offsets) offset = random.between(0, length);
  std::sort(offsets.begin(), offsets.end());
  if (!offsets.empty() && random.one_in(3)) {
    offsets[static_cast<std::size_t>(
        random.between(0, static_cast<std::int64_t>(offsets.size()) - 1))] =
        random.one_in(2) ? random.hostile() : random.between(-2, length + 2);
  }
  const bool resumed = random.one_in(2);
  const std::size_t streams = offsets.empty() ? 0 : offsets.size() - 1;
  const auto around = [&](std::size_t n) {
    return random.one_in(8) ? static_cast<std::size_t>(random.between(0, 9)) : n;
  };
  std::vector<std::uint32_t> states(around(streams));
  std::vector<std::int64_t> positions(around(streams));
  for (auto& state : states) {
    state = static_cast<std::uint32_t>(random.one_in(16) ? random.hostile()
                                       : random.one_in(3)
                                           ? random.pick({0, (1 << 23) - 1, 1 << 23, 0x7FFFFFFF})
                                           : random.between(0, 0x7FFFFFFF));
  }
  for (std::size_t b = 0; b < positions.size(); ++b) {
    const std::int64_t own = b + 1 < offsets.size() && offsets[b] >= 0 &&
                                     offsets[b + 1] <= length && offsets[b] <= offsets[b + 1]
                                 ? offsets[b + 1] - offsets[b]
                                 : 3;
    positions[b] = random.one_in(16) ? random.hostile() : random.between(0, own);
  }
  std::unique_ptr<BatchDecoder> decoder;
  if (!returns(outcomes, [&] {
        decoder = std::make_unique<BatchDecoder>(buffer, offsets, resumed, states, positions);
      })) {
    return;
  }
  check_decoder(*decoder, offsets);
  for (int calls = 0; calls < 3; ++calls) {
    const std::int64_t rows = random.between(0, 6);
    const std::int64_t count = random.between(0, 3);
    std::vector<std::int64_t> names(static_cast<std::size_t>(rows));
    std::iota(names.begin(), names.end(), random.one_in(4) ? -1 : 0);
    if (rows > 0 && random.one_in(4)) names[0] = random.one_in(2) ? random.hostile() : rows - 1;
    Sizes sizes = random_sizes(random, 300);
    if (random.one_in(6)) sizes.prob_bits = static_cast<int>(random.hostile());
    const int threads =
        random.one_in(8) ? static_cast<int>(random.hostile()) : random_threads(random);
    Fenced<std::int32_t> symbols(rows * count);
    bool done = false;
    if (random.one_in(2)) {
      const RandomLogits rows_of(random, rows * count, sizes.codebook, random.one_in(3));
      percov2::Logits logits = rows_of.view();
      // A size that is refused is refused before anything is read.
      if (random.one_in(6)) logits.codebook = random.pick({-1, 0, 1, 8193, INT64_MAX, INT64_MIN});
      const std::vector<std::uint32_t> before = decoder->states();
      done = returns(outcomes, [&] {
        decoder->decode_logits(logits, names.data(), rows, count, sizes.prob_bits, threads,
                               symbols.data());
      });
      PERCOV2_PROMISE(done || decoder->states() == before);
      PERCOV2_PROMISE(!done || rows_of.valid());
    } else {
      const int bits = std::min(std::max(sizes.prob_bits, 8), 20);
      Fenced<std::int32_t> cdf(rows * count * (sizes.codebook + 1), random.one_in(2));
      for (std::int64_t i = 0; i < rows * count; ++i) {
        std::int32_t* line = cdf.data() + i * (sizes.codebook + 1);
        const std::int64_t step = ((std::int64_t{1} << bits) + sizes.codebook - 1) / sizes.codebook;
        for (std::int64_t j = 0; j <= sizes.codebook; ++j) {
          line[j] = static_cast<std::int32_t>(
              std::min(j * step, (std::int64_t{1} << bits) - (sizes.codebook - j)));
        }
        if (random.one_in(16)) {
          line[random.between(0, sizes.codebook)] = static_cast<std::int32_t>(random.hostile());
        }
      }
      done = returns(outcomes, [&] {
        decoder->decode_cdf(cdf.data(), names.data(), rows, count, sizes.codebook, sizes.prob_bits,
                            random.one_in(2), threads, symbols.data());
      });
    }
    check_decoder(*decoder, offsets);
    for (std::int64_t i = 0; done && i < rows * count; ++i) {
      PERCOV2_PROMISE(symbols[i] >= 0 && symbols[i] < sizes.codebook);
    }
  }
}

}  // namespace percov2_test
