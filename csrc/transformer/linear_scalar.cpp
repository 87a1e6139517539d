// Quantized linear maps, number by number.

#include "transformer/linear_kernels.h"

namespace percov2 {
namespace {

constexpr std::int32_t kResidualLimit = 1 << 20;

inline std::int32_t clamp(std::int32_t value, std::int32_t low, std::int32_t high) {
  return value < low ? low : value > high ? high : value;
}

// Calls put(row, output, value) with each output before clamping.
template <class Put>
void for_each_output(const LinearMap& map, const std::int8_t* x, std::int64_t x_stride,
                     std::int64_t rows, Put&& put) {
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int8_t* line = x + row * x_stride;
    for (std::int64_t block = 0; block < map.blocks; ++block) {
      std::int32_t acc[kOutputBlock];
      for (std::int64_t o = 0; o < kOutputBlock; ++o) acc[o] = map.bias[block * kOutputBlock + o];
      const std::int8_t* weight = map.weight + block * map.quads * kOutputBlock * kQuad;
      for (std::int64_t q = 0; q < map.quads; ++q) {
        for (std::int64_t o = 0; o < kOutputBlock; ++o) {
          const std::int8_t* w = weight + (q * kOutputBlock + o) * kQuad;
          const std::int8_t* v = line + q * kQuad;
          acc[o] += w[0] * v[0] + w[1] * v[1] + w[2] * v[2] + w[3] * v[3];
        }
      }
      for (std::int64_t o = 0; o < kOutputBlock; ++o) {
        // |acc| < 2^24, multiplier <= 127 and shift <= 24: within int32.
        const std::int64_t at = block * kOutputBlock + o;
        put(row, at, (acc[o] * map.multiplier[at] + map.half[at]) >> map.shift[at]);
      }
    }
  }
}

void to_bytes(const LinearMap& map, const std::int8_t* x, std::int64_t x_stride, std::int64_t rows,
              std::int8_t* y, std::int64_t y_stride) {
  for_each_output(map, x, x_stride, rows,
                  [&](std::int64_t row, std::int64_t output, std::int32_t value) {
                    y[row * y_stride + output] = static_cast<std::int8_t>(clamp(value, -127, 127));
                  });
}

void to_words(const LinearMap& map, const std::int8_t* x, std::int64_t x_stride, std::int64_t rows,
              std::int16_t* y, std::int64_t y_stride) {
  for_each_output(
      map, x, x_stride, rows, [&](std::int64_t row, std::int64_t output, std::int32_t value) {
        if (output >= map.outputs) return;
        y[row * y_stride + output] = static_cast<std::int16_t>(clamp(value, -32768, 32767));
      });
}

void add_to(const LinearMap& map, const std::int8_t* x, std::int64_t x_stride, std::int64_t rows,
            std::int32_t* residual, std::int64_t residual_stride) {
  for_each_output(map, x, x_stride, rows,
                  [&](std::int64_t row, std::int64_t output, std::int32_t value) {
                    std::int32_t& r = residual[row * residual_stride + output];
                    r = clamp(r + clamp(value, -kResidualLimit, kResidualLimit), -kResidualLimit,
                              kResidualLimit);
                  });
}

}  // namespace

const LinearKernels kLinearScalar = {to_bytes, to_words, add_to};

}  // namespace percov2
