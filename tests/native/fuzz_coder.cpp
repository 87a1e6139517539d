// fuzz_coder <seconds> <seed> [<case>]: random and hostile calls of the compiled core, built with
// sanitizers; what the coder returns is compared with plain_coder.h. Prints what was run; a finding
// ends the program with the case that found it, and naming that case as the third argument runs it
// alone. check_coder is the same as released, without the transformer, which check_kernels
// compares.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "fuzz.h"
#include "support/isa.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define PERCOV2_SANITIZED 1
#include <sanitizer/common_interface_defs.h>
#endif

namespace percov2_test {
namespace {

std::uint64_t current_seed = 0;
std::uint64_t current_case = 0;
const char* current_subject = "none";

void tell_case() {
  std::fprintf(stderr, "fuzz_coder: found by: fuzz_coder 0 %llu %llu (%s, %s)\n",
               static_cast<unsigned long long>(current_seed),
               static_cast<unsigned long long>(current_case), current_subject,
               percov2::isa_name(percov2::active_isa()));
}

struct Subject {
  const char* name;
  void (*run)(Random&, Outcomes&);
  Outcomes outcomes;
  std::int64_t cases;
};

Subject subjects[] = {
    {"streams", fuzz_streams, {}, 0},
    {"decoder arguments", fuzz_decoder_arguments, {}, 0},
    {"encoder arguments", fuzz_encoder_arguments, {}, 0},
    {"interval arguments", fuzz_interval_arguments, {}, 0},
#if PERCOV2_SANITIZED
    {"transformer", fuzz_transformer, {}, 0},
    {"transformer parameters", fuzz_transformer_parameters, {}, 0},
#endif
};
constexpr std::int64_t kLeastCases = 200;
constexpr std::uint64_t kSubjects = sizeof subjects / sizeof subjects[0];

void run_case(std::uint64_t seed, std::uint64_t number, const std::vector<percov2::Isa>& sets) {
  Random random(seed * 0xD1342543DE82EF95u + number);
  Subject& subject = subjects[number % kSubjects];
  current_case = number;
  current_subject = subject.name;
  percov2::use_isa(sets[static_cast<std::size_t>(
      random.between(0, static_cast<std::int64_t>(sets.size()) - 1))]);
  subject.run(random, subject.outcomes);
  ++subject.cases;
}

}  // namespace

void broken(const char* promise, const char* file, int line) {
  std::fprintf(stderr, "%s:%d: does not hold: %s\n", file, line, promise);
  tell_case();
  std::abort();
}

int run(double seconds, std::uint64_t seed, const char* only) {
#if PERCOV2_SANITIZED
  __sanitizer_set_death_callback(tell_case);
#endif
  const std::vector<percov2::Isa> sets = instruction_sets();
  current_seed = seed;
  if (only != nullptr) {
    run_case(seed, std::strtoull(only, nullptr, 10), sets);
    std::printf("no finding in this case\n");
    return 0;
  }
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  const auto elapsed = [&] { return std::chrono::duration<double>(Clock::now() - start).count(); };
  std::int64_t total = 0;
  while (total < kLeastCases || elapsed() < seconds) {
    run_case(seed, static_cast<std::uint64_t>(total++), sets);
  }
  for (const Subject& subject : subjects) {
    std::printf("%-24s %9lld cases %10lld calls returned %10lld refused\n", subject.name,
                static_cast<long long>(subject.cases),
                static_cast<long long>(subject.outcomes.accepted),
                static_cast<long long>(subject.outcomes.refused));
  }
  std::printf("no finding: %lld cases in %.0f s, seed %llu, instruction sets:",
              static_cast<long long>(total), elapsed(), static_cast<unsigned long long>(seed));
  for (const percov2::Isa isa : sets) std::printf(" %s", percov2::isa_name(isa));
  std::printf("\n");
  return 0;
}

}  // namespace percov2_test

int main(int argc, char** argv) {
  if (argc < 3 || argc > 4) {
    std::fprintf(stderr, "usage: fuzz_coder <seconds> <seed> [<case>]\n");
    return 2;
  }
  return percov2_test::run(std::strtod(argv[1], nullptr), std::strtoull(argv[2], nullptr, 10),
                           argc == 4 ? argv[3] : nullptr);
}
