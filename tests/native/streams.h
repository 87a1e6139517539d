// The streams of an encoder, written into exactly as much memory as they need.
#pragma once

#include <cstdint>
#include <vector>

#include "coder/coder.h"
#include "random_input.h"

namespace percov2_test {

inline void finish(const percov2::BatchEncoder& encoder, std::vector<std::uint8_t>& bytes,
                   std::vector<std::int64_t>& offsets) {
  offsets = encoder.offsets();
  Fenced<std::uint8_t> buffer(offsets.back());
  encoder.finish(buffer.data());
  bytes.assign(buffer.data(), buffer.data() + buffer.size());
}

}  // namespace percov2_test
