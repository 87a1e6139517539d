// What the subjects of fuzz_coder share: outcomes of a case, and the end of a run that failed.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "random_input.h"

namespace percov2_test {

// Counts of what happened inside the cases of one subject.
struct Outcomes {
  std::int64_t accepted = 0;  // calls that returned
  std::int64_t refused = 0;   // calls answered with std::invalid_argument
};

// Ends the program with the file, line and case of a broken promise.
[[noreturn]] void broken(const char* promise, const char* file, int line);

#define PERCOV2_PROMISE(condition) \
  if (!(condition)) ::percov2_test::broken(#condition, __FILE__, __LINE__)

// Runs `call`; true iff it returned, false iff it threw std::invalid_argument. Everything else that
// is thrown ends the program, because nobody catches it.
template <class Call>
bool returns(Outcomes& outcomes, Call&& call) {
  try {
    call();
  } catch (const std::invalid_argument&) {
    ++outcomes.refused;
    return false;
  }
  ++outcomes.accepted;
  return true;
}

// Runs `call` on every other instruction set.
template <class Call>
void with_other_sets(Call&& call) {
  const percov2::Isa before = percov2::active_isa();
  for (const percov2::Isa isa : instruction_sets()) {
    if (isa == before) continue;
    percov2::use_isa(isa);
    call();
  }
  percov2::use_isa(before);
}

// Threads of a call: few calls use several, unless races are looked for.
inline int random_threads(Random& random) {
#if defined(__SANITIZE_THREAD__)
  return static_cast<int>(random.between(2, 4));
#else
  return random.one_in(8) ? static_cast<int>(random.between(2, 4)) : 1;
#endif
}

// The subjects: each runs one case.
void fuzz_streams(Random& random, Outcomes& outcomes);
void fuzz_decoder_arguments(Random& random, Outcomes& outcomes);
void fuzz_encoder_arguments(Random& random, Outcomes& outcomes);
void fuzz_interval_arguments(Random& random, Outcomes& outcomes);
void fuzz_transformer(Random& random, Outcomes& outcomes);
void fuzz_transformer_parameters(Random& random, Outcomes& outcomes);

}  // namespace percov2_test
