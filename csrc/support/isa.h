// Instruction sets: those in this build, those of this machine, and the one in use.
//
// Every instruction set has its own translation units and compiler flags. These units include no
// standard library header but <cstdint> and <cstddef>, so that inline functions compiled for
// AVX-512 cannot end up in code that runs everywhere. Every subject (intervals, linear maps,
// attention) keeps a table of its kernels, indexed by Isa.
#pragma once

#include <cstdint>

namespace percov2 {

enum class Isa : std::int32_t {
  kScalar,  // plain C++ that every machine runs
  kAvx2,    // AVX2, FMA, BMI2
  kAvx512,  // those and AVX-512 F, BW, DQ, VL, VBMI, VNNI: Ice Lake, Zen 4 and later
  kNeon,    // AArch64
};
constexpr int kIsaCount = 4;

// "scalar", "avx2", "avx512", "neon".
const char* isa_name(Isa isa);
// True if this build has the kernels and this machine runs them.
bool isa_available(Isa isa);
// The instruction set in use: the best available one, or the choice of use_isa.
Isa active_isa();
// For tests and measurements: all kernels that start later use `isa`, in all threads. Throws
// std::invalid_argument unless it is available.
void use_isa(Isa isa);

}  // namespace percov2
