// check_kernels [<effort> [<seed>]]: the kernels of every instruction set that this machine runs
// give the integers of the plain statements in plain_coder.h and plain_transformer.h. Prints one
// line for each subject; exits with 1 if anything differs.

#include <cstdio>
#include <cstdlib>

#include "check.h"

int main(int argc, char** argv) {
  const std::int64_t effort = argc > 1 ? std::atoll(argv[1]) : 10;
  const std::uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  std::printf("instruction sets:");
  for (const percov2::Isa isa : percov2_test::instruction_sets()) {
    std::printf(" %s", percov2::isa_name(isa));
  }
  std::printf("\n");
  const bool coder = percov2_test::check_coder(effort, seed);
  const bool transformer = percov2_test::check_transformer(effort, seed);
  return coder && transformer ? 0 : 1;
}
