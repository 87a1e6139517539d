// What the subjects of check_kernels share: counting cases, telling differences.
#pragma once

#include <cstdint>
#include <cstdio>

#include "support/isa.h"

namespace percov2_test {

// One line of the report: what a kernel computes, against its plain statement.
class Subject {
 public:
  explicit Subject(const char* name) : name_(name) {}

  // Compares `count` results of the instruction set in use; tells the first few differences.
  template <class Got, class Expected>
  void compare(const Got* got, const Expected* expected, std::int64_t count, std::int64_t first,
               std::int64_t second) {
    ++cases_;
    results_ += count;
    for (std::int64_t i = 0; i < count; ++i) {
      if (static_cast<std::int64_t>(got[i]) == static_cast<std::int64_t>(expected[i])) continue;
      if (differing_++ < 5) {
        std::printf("  %s on %s, sizes %lld and %lld: result %lld of %lld is %lld, not %lld\n",
                    name_, percov2::isa_name(percov2::active_isa()), static_cast<long long>(first),
                    static_cast<long long>(second), static_cast<long long>(i),
                    static_cast<long long>(count), static_cast<long long>(got[i]),
                    static_cast<long long>(expected[i]));
      }
      return;
    }
  }

  // Prints the line; true iff nothing differed.
  bool report() const {
    std::printf("%-24s %8lld cases %11lld results %s\n", name_, static_cast<long long>(cases_),
                static_cast<long long>(results_), differing_ == 0 ? "equal" : "DIFFER");
    return differing_ == 0 && cases_ > 0;
  }

 private:
  const char* name_;
  std::int64_t cases_ = 0;
  std::int64_t results_ = 0;
  std::int64_t differing_ = 0;
};

}  // namespace percov2_test
