#include "support/isa.h"

#include <atomic>
#include <initializer_list>
#include <stdexcept>
#include <string>

#if defined(PERCOV2_X86_KERNELS)
#include <cpuid.h>
#endif

namespace percov2 {
namespace {

#if defined(PERCOV2_X86_KERNELS)
struct Processor {
  bool avx2 = false, avx512 = false;
};

// What the processor has and the system saves. __builtin_cpu_supports would ask the compiler's
// runtime, which is incomplete on some platforms. Intel's manual, volume 2A, CPUID and XGETBV.
Processor ask_processor() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const auto all = [](unsigned word, std::initializer_list<int> bits) {
    for (const int bit : bits) {
      if ((word >> bit & 1) == 0) return false;
    }
    return true;
  };
  if (__get_cpuid(1, &eax, &ebx, &ecx, &edx) == 0) return {};
  constexpr int kFma = 12, kOsxsave = 27, kAvx = 28;
  if (!all(ecx, {kFma, kOsxsave, kAvx})) return {};
  unsigned saved = 0, high = 0;
  __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return {};
  Processor found;
  constexpr int kAvx2 = 5, kBmi2 = 8;
  found.avx2 = all(saved, {1, 2}) && all(ebx, {kAvx2, kBmi2});
  constexpr int kAvx512F = 16, kAvx512Dq = 17, kAvx512Bw = 30, kAvx512Vl = 31;
  constexpr int kAvx512Vbmi = 1, kAvx512Vnni = 11;
  found.avx512 = found.avx2 && all(saved, {5, 6, 7}) &&
                 all(ebx, {kAvx512F, kAvx512Dq, kAvx512Bw, kAvx512Vl}) &&
                 all(ecx, {kAvx512Vbmi, kAvx512Vnni});
  return found;
}

Processor processor() {
  static const Processor found = ask_processor();
  return found;
}
#endif

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
      return processor().avx2;
    case Isa::kAvx512:
      return processor().avx512;
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
