// The integer token transformer of docs/reference/entropy-model.md on the CPU, as passes over token
// grids.
//
// Encoding is one pass for all stages; decoding is one pass per stage. A pass runs every layer over
// a few images at a time, so that intermediate results stay in cache and memory does not grow with
// the batch. All sums are exact integers, so results do not depend on chunks or threads.
#pragma once

#include <cstdint>
#include <vector>

#include "support/aligned_array.h"
#include "transformer/attention.h"
#include "transformer/linear.h"

namespace percov2 {

struct LayerParameters {
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

struct TransformerParameters {
  std::int64_t codebook, dim, heads, head_dim;
  const std::int16_t* token;   // [codebook, dim]
  const std::int16_t* query;   // [dim]
  const std::int16_t* row;     // [16, dim]
  const std::int16_t* column;  // [16, dim]
  const std::int16_t* start;   // [3, dim]
  const std::int16_t* height;  // [17, dim]
  const std::int16_t* width;   // [17, dim]
  std::vector<LayerParameters> layers;
  const std::int16_t* head_gain;  // [dim]
  LinearParameters head;
};

// The parameters, packed. Rows of residuals are row_lanes(dim) apart, of activations row_bytes.
class IntegerTransformer {
 public:
  explicit IntegerTransformer(const TransformerParameters& parameters);

  std::int64_t codebook() const { return codebook_; }
  std::int64_t dim() const { return dim_; }
  std::int64_t heads() const { return heads_; }
  std::int64_t head_dim() const { return head_dim_; }
  std::int64_t inner() const { return heads_ * head_dim_; }
  std::int64_t layers() const { return static_cast<std::int64_t>(layers_.size()); }

  // residual [rows, dim] -> logits [rows, codebook], both without padding.
  void logits(const std::int32_t* residual, std::int64_t rows, int threads,
              std::int16_t* out) const;

 private:
  friend class TokenPass;

  struct Layer {
    Layer(const LayerParameters& parameters, std::int64_t dim, std::int64_t heads);
    NormGain attention_gain;
    QuantizedLinear q, kv;
    ScoreTables scores;
    QuantizedLinear out;
    NormGain mlp_gain;
    QuantizedLinear up;
    AlignedArray<std::int8_t> gelu;  // [256], by the byte of x
    QuantizedLinear down;
  };

  std::int64_t codebook_, dim_, heads_, head_dim_;
  std::vector<std::int16_t> token_, query_, row_, column_, start_, height_, width_;
  std::vector<Layer> layers_;
  NormGain head_gain_;
  QuantizedLinear head_;
};

// Passes over token grids of one shape and schedule.
class TokenPass {
 public:
  // `model` must outlive the pass. stages [height, width], 1 .. S without gaps.
  TokenPass(const IntegerTransformer& model, const std::int32_t* stages, std::int64_t height,
            std::int64_t width);

  const StageGrid& grid() const { return grid_; }
  const IntegerTransformer& model() const { return model_; }

  // The residual of all queries after the last layer, in coding order: tokens [batch, positions] in
  // raster order -> out [batch, positions, dim]. Throws std::invalid_argument for a token outside
  // the codebook.
  void encode(const std::int32_t* tokens, std::int64_t batch, int threads, std::int32_t* out) const;

 protected:
  // The entries of every image in one pass: contents (start entries and tokens of known stages),
  // which become keys, then queries.
  // An entry that reads, and the cells that it reads.
  struct Reading {
    std::int64_t entry;
    Sight sight;
  };
  struct Entries {
    std::vector<std::int32_t> position;  // in coding order, -1 - s for start entry s
    std::vector<Reading> all;            // contents and queries, partners side by side
    std::vector<Reading> last;           // queries alone, for the last layer
    std::int64_t contents = 0;

    std::int64_t count() const { return static_cast<std::int64_t>(position.size()); }
    std::int64_t queries() const { return count() - contents; }
  };
  // The keys of image b and layer l are at base + b * image_stride + l * layer_stride.
  struct KeyMemory {
    std::int8_t* base;
    std::int64_t image_stride;
    std::int64_t layer_stride;
  };

  // A checked copy of tokens, because the caller's memory may change. Throws std::invalid_argument
  // for a token outside the codebook.
  std::vector<std::int32_t> checked_tokens(const std::int32_t* tokens, std::int64_t count) const;
  void add_starts(Entries& entries) const;
  // Positions first .. last of the coding order.
  void add_contents(Entries& entries, std::int64_t first, std::int64_t last) const;
  void add_queries(Entries& entries, std::int64_t first, std::int64_t last) const;
  // Finds partners. Comes after all entries are added.
  void plan(Entries& entries) const;
  // The residual of the queries, out [batch, queries, dim]. `cache` stores keys for later passes
  // and provides those of earlier ones; without it, the contents are all keys.
  void run(const Entries& entries, const std::int32_t* tokens, std::int64_t batch,
           const KeyMemory* cache, int threads, std::int32_t* out) const;

  const IntegerTransformer& model_;
  StageGrid grid_;
  KeyLayout layout_;

 private:
  struct Chunk;

  void run_chunk(Chunk& chunk, int threads, std::int32_t* out) const;
  void embed(Chunk& chunk, std::int64_t first, std::int64_t last) const;
  void project(Chunk& chunk, std::int64_t layer, std::int64_t first, std::int64_t last) const;
  void attend(Chunk& chunk, std::int64_t layer, int threads) const;
  void feed_forward(Chunk& chunk, std::int64_t layer, std::int64_t first, std::int64_t last) const;
};

// Decoding, with a cache of the keys and values of all known tokens.
class StagedPass : public TokenPass {
 public:
  // Throws std::invalid_argument for a batch below 1.
  StagedPass(const IntegerTransformer& model, const std::int32_t* stages, std::int64_t height,
             std::int64_t width, std::int64_t batch);

  std::int64_t batch() const { return batch_; }
  // Positions per image of the next stage, 0 after the last.
  std::int64_t next_count() const;
  // The residual of the next stage's queries: out [batch, next_count(), dim]. Throws
  // std::out_of_range if no stage remains. May be called again before accept().
  void decode(int threads, std::int32_t* out);
  // Takes the tokens of the next stage, [batch, next_count()] in raster order. Throws
  // std::invalid_argument for a token outside the codebook, or if no stage remains.
  void accept(const std::int32_t* tokens);
  // The tokens so far, 0 elsewhere: [batch, positions] in raster order.
  const std::int32_t* tokens() const { return tokens_.data(); }

 private:
  std::int64_t batch_;
  std::int64_t known_ = 0;  // stages
  AlignedArray<std::int32_t> tokens_;
  AlignedArray<std::int8_t> cache_;
};

}  // namespace percov2
