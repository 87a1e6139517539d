// Kernels of the quantizer with NEON.
//
// NEON has no gather: weights are loaded lane by lane, and the vector unit computes indices, shifts
// and sums. The plain search reads 32 sums at most and stops early.
#include <arm_neon.h>

#include "coder/intervals_kernels.h"

namespace percov2 {
namespace {

std::int32_t row_max(const std::int16_t* logits, std::int64_t count) {
  std::int64_t i = 0;
  std::int16_t best = logits[0];
  if (count >= 8) {
    int16x8_t most = vld1q_s16(logits);
    for (i = 8; i + 8 <= count; i += 8) most = vmaxq_s16(most, vld1q_s16(logits + i));
    best = vmaxvq_s16(most);
  }
  for (; i < count; ++i) best = logits[i] > best ? logits[i] : best;
  return best;
}

// Four weights: table entries at `index`, shifted right by `octaves`.
inline uint32x4_t four_weights(uint16x4_t index, uint16x4_t octaves) {
  uint32x4_t entry = vdupq_n_u32(0);
  entry = vld1q_lane_u32(kWeightTable + vget_lane_u16(index, 0), entry, 0);
  entry = vld1q_lane_u32(kWeightTable + vget_lane_u16(index, 1), entry, 1);
  entry = vld1q_lane_u32(kWeightTable + vget_lane_u16(index, 2), entry, 2);
  entry = vld1q_lane_u32(kWeightTable + vget_lane_u16(index, 3), entry, 3);
  // A negative count shifts right. The instruction reads its low byte, so the limit is 31.
  return vshlq_u32(entry, vnegq_s32(vreinterpretq_s32_u32(vmovl_u16(octaves))));
}

struct EightWeights {
  uint32x4_t low, high;
};

inline EightWeights eight_weights(const std::int16_t* logits, uint16x8_t top) {
  // The difference is 0 .. 65535 and fits 16 unsigned bits.
  const uint16x8_t difference = vsubq_u16(top, vreinterpretq_u16_s16(vld1q_s16(logits)));
  const uint16x8_t index = vandq_u16(difference, vdupq_n_u16(255));
  const uint16x8_t octaves = vminq_u16(vshrq_n_u16(difference, 8), vdupq_n_u16(31));
  return {four_weights(vget_low_u16(index), vget_low_u16(octaves)),
          four_weights(vget_high_u16(index), vget_high_u16(octaves))};
}

inline uint16x8_t spread_top(std::int32_t top) {
  return vdupq_n_u16(static_cast<std::uint16_t>(top));
}

std::uint64_t sum(const std::int16_t* logits, std::int64_t count, std::int32_t top) {
  const uint16x8_t tops = spread_top(top);
  uint64x2_t totals = vdupq_n_u64(0);
  std::int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const EightWeights w = eight_weights(logits + i, tops);
    totals = vpadalq_u32(totals, vaddq_u32(w.low, w.high));
  }
  std::uint64_t total = vaddvq_u64(totals);
  for (; i < count; ++i) total += logit_weight(top - logits[i]);
  return total;
}

Share share(const std::int16_t* logits, std::int64_t count, std::int32_t top, std::int32_t symbol) {
  const std::uint64_t prefix = sum(logits, symbol, top);
  const std::uint32_t weight = logit_weight(top - logits[symbol]);
  const std::uint64_t suffix = sum(logits + symbol + 1, count - symbol - 1, top);
  return {prefix, prefix + weight + suffix, weight};
}

void weigh(const std::int16_t* logits, std::int64_t count, std::int32_t top, std::uint32_t* weights,
           std::uint32_t* groups, std::uint32_t* blocks) {
  const uint16x8_t tops = spread_top(top);
  for (std::int64_t first = 0; first < count; first += kRowBlock) {
    std::uint32_t block = 0;
    for (std::int64_t g = first; g < first + kRowBlock; g += kRowGroup) {
      std::uint32_t group = 0;
      if (g + kRowGroup <= count) {
        const EightWeights a = eight_weights(logits + g, tops);
        const EightWeights b = eight_weights(logits + g + 8, tops);
        vst1q_u32(weights + g, a.low);
        vst1q_u32(weights + g + 4, a.high);
        vst1q_u32(weights + g + 8, b.low);
        vst1q_u32(weights + g + 12, b.high);
        group = vaddvq_u32(vaddq_u32(vaddq_u32(a.low, a.high), vaddq_u32(b.low, b.high)));
      } else {
        for (std::int64_t i = g; i < g + kRowGroup; ++i) {
          weights[i] = i < count ? logit_weight(top - logits[i]) : 0;
          group += weights[i];
        }
      }
      *groups++ = group;
      block += group;
    }
    *blocks++ = block;
  }
}

inline float32x4_t load_four(const float* logits) { return vld1q_f32(logits); }

inline float32x4_t load_four(const std::uint16_t* logits) {
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(logits), 16));
}

template <class Float>
bool round_logits(const Float* logits, std::int64_t count, std::int16_t* out) {
  float top = widened(logits[0]);
  std::int64_t i = 0;
  if (count >= 4) {
    float32x4_t most = load_four(logits);
    for (i = 4; i + 4 <= count; i += 4) most = vmaxq_f32(most, load_four(logits + i));
    top = vmaxvq_f32(most);
  }
  // Unlike a comparison, the instruction keeps every NaN.
  for (; i < count; ++i) {
    top = vget_lane_f32(vmax_f32(vdup_n_f32(top), vdup_n_f32(widened(logits[i]))), 0);
  }
  // x - x is 0 for numbers, but not for infinities and NaN.
  if (!(top - top == 0.0f)) return false;
  const float32x4_t tops = vdupq_n_f32(top);
  for (i = 0; i + 4 <= count; i += 4) {
    const float32x4_t steps =
        vmulq_f32(vsubq_f32(load_four(logits + i), tops), vdupq_n_f32(kStepsPerNat));
    // Ties to even.
    const int32x4_t rounded = vcvtnq_s32_f32(vmaxq_f32(steps, vdupq_n_f32(-32768.0f)));
    vst1_s16(out + i, vmovn_s32(rounded));
  }
  for (; i < count; ++i) {
    const float steps = (widened(logits[i]) - top) * kStepsPerNat;
    out[i] = static_cast<std::int16_t>(vcvtns_s32_f32(steps > -32768.0f ? steps : -32768.0f));
  }
  return true;
}

}  // namespace

const IntervalKernels kNeonIntervals = {row_max,      share,        weigh,
                                        plain_search, round_logits, round_logits};

}  // namespace percov2
