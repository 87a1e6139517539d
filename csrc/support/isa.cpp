#include "support/isa.h"

#include <atomic>
#include <stdexcept>
#include <string>

namespace percov2 {
namespace {

Isa best_isa() {
  for (const Isa isa : {Isa::kAvx512, Isa::kAvx2, Isa::kNeon}) {
    if (isa_available(isa)) return isa;
  }
  return Isa::kScalar;
}

std::atomic<Isa>& active() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

}  // namespace

const char* isa_name(Isa isa) {
  constexpr const char* kNames[kIsaCount] = {"scalar", "avx2", "avx512", "neon"};
  return kNames[static_cast<int>(isa)];
}

bool isa_available(Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      return true;
#if defined(PERCOV2_X86_KERNELS)
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("bmi2");
    case Isa::kAvx512:
      return isa_available(Isa::kAvx2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi") &&
             __builtin_cpu_supports("avx512vnni");
#elif defined(PERCOV2_NEON_KERNELS)
    case Isa::kNeon:
      return true;  // part of every AArch64 processor
#endif
    default:
      return false;
  }
}

Isa active_isa() { return active().load(std::memory_order_relaxed); }

void use_isa(Isa isa) {
  if (!isa_available(isa)) {
    throw std::invalid_argument(std::string("instruction set ") + isa_name(isa) +
                                " is not available here");
  }
  active().store(isa, std::memory_order_relaxed);
}

}  // namespace percov2
