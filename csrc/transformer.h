// The integer token transformer on the CPU: docs/entropy-model.md, operation by operation.
//
// Products of integers are computed in float: every partial sum stays below 2^24, where float is
// exact in any order, and loops over float vectorise on every machine. Nothing else is float except
// quotients in double, whose floors are exact in the ranges given. All functions are pure.
#pragma once

#include <cstdint>
#include <vector>

namespace percov2 {

// A linear map with requantization, as stored: weight [outputs, terms], the rest [outputs].
struct LinearParameters {
  const std::int8_t* weight;
  const std::int32_t* bias;
  const std::int8_t* multiplier;
  const std::int8_t* shift;
  std::int64_t outputs;
  std::int64_t terms;
};

// clamp((x . w + bias) * multiplier + 2^(shift - 1) >> shift, low, high).
class QuantizedLinear {
 public:
  QuantizedLinear(const LinearParameters& parameters, std::int32_t low, std::int32_t high);
  // x [rows, terms], integers of at most 127 in magnitude; y [rows, outputs].
  void run(const float* x, std::int64_t rows, std::int32_t* y) const;
  std::int64_t outputs() const { return outputs_; }
  std::int64_t terms() const { return terms_; }

 private:
  std::int64_t outputs_;
  std::int64_t terms_;
  std::int32_t low_;
  std::int32_t high_;
  std::vector<std::int8_t> weight_;  // [tile of 32 outputs][terms][32], zeros beyond the last
  std::vector<float> bias_;
  std::vector<std::int32_t> multiplier_;
  std::vector<std::int32_t> shift_;
};

constexpr std::int32_t kMaxSide = 16384;  // of a grid of tokens

// Positions and times of entries; start entries have row and column -1 and come first among keys.
struct EntryView {
  const std::int32_t* row;
  const std::int32_t* column;
  const std::int32_t* stage;  // keys: key_stage; readers: reads
  std::int64_t count;
};

struct LayerParameters {
  std::int64_t dim;
  std::int64_t heads;
  std::int64_t head_dim;
  const std::int16_t* attention_gain;  // [dim]
  LinearParameters q;
  LinearParameters kv;
  const std::int16_t* score_bias;  // [heads, 31 * 31 + 3]
  const std::int8_t* score_shift;  // [heads]
  int gain_bits;
  LinearParameters out;
  const std::int16_t* mlp_gain;  // [dim]
  LinearParameters up;
  const std::int8_t* gelu;  // [256]
  LinearParameters down;
};

// One layer of the transformer.
class IntegerLayer {
 public:
  explicit IntegerLayer(const LayerParameters& parameters);

  std::int64_t dim() const { return dim_; }
  std::int64_t inner() const { return heads_ * head_dim_; }

  // Keys and values of contents: residual [rows, dim]; k and v [rows, inner].
  void keys_values(const std::int32_t* residual, std::int64_t rows, int threads, std::int8_t* k,
                   std::int8_t* v) const;

  // The residual of readers after this layer, in place. residual [batch, readers, dim]; k and v
  // [batch, keys, inner], images `key_stride` keys apart. Throws std::invalid_argument for entries
  // outside a grid of kMaxSide, and for negative or the largest stages.
  void advance(std::int32_t* residual, std::int64_t batch, const EntryView& readers,
               const std::int8_t* k, const std::int8_t* v, std::int64_t key_stride,
               const EntryView& keys, int threads) const;

 private:
  struct Workspace;
  void attend_tile(Workspace& w, const EntryView& readers, const std::int64_t* picks,
                   std::int64_t count, const std::int8_t* k, const std::int8_t* v) const;
  void advance_tile(Workspace& w, std::int32_t* residual, const EntryView& readers,
                    const std::int64_t* picks, std::int64_t count, const std::int8_t* k,
                    const std::int8_t* v, const EntryView& keys) const;

  std::int64_t dim_;
  std::int64_t heads_;
  std::int64_t head_dim_;
  int gain_bits_;
  std::vector<std::int32_t> attention_gain_;
  std::vector<std::int32_t> mlp_gain_;
  std::vector<std::int32_t> window_bias_;  // [heads, 31, 32], hidden in the last
  std::vector<std::int32_t> start_bias_;   // [heads, 3]
  std::vector<std::int32_t> score_shift_;
  std::vector<float> gelu_;
  QuantizedLinear q_, kv_, out_, up_, down_;
};

// The last LayerNorm and the map to logits.
class IntegerHead {
 public:
  IntegerHead(std::int64_t dim, const std::int16_t* gain, const LinearParameters& parameters);
  std::int64_t dim() const { return dim_; }
  std::int64_t outputs() const { return linear_.outputs(); }
  // residual [rows, dim] -> logits [rows, outputs].
  void logits(const std::int32_t* residual, std::int64_t rows, int threads,
              std::int16_t* out) const;

 private:
  std::int64_t dim_;
  std::vector<std::int32_t> gain_;
  QuantizedLinear linear_;
};

// Integer LayerNorm of each row: residual [rows, dim] -> out [rows, dim], integers in float.
void layer_norm(const std::int32_t* residual, const std::int32_t* gain, std::int64_t rows,
                std::int64_t dim, float* out);

}  // namespace percov2
