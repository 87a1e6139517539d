// Kernels of integer attention, one table per instruction set.
//
// The keys of an image lie on its grid, so the keys of a reader's 31 x 31 window and their biases
// are side by side. Cells without a visible key are computed and masked; groups of four rows
// without one are skipped. docs/reference/entropy-model.md, section 3, defines the result. Every
// sum is exact in int32, so the order of summation is free.
#pragma once

#include <cstdint>

namespace percov2 {

constexpr std::int64_t kRadius = 15;
constexpr std::int64_t kWindow = 2 * kRadius + 1;
constexpr std::int64_t kStartEntries = 3;
constexpr std::int64_t kMaxHeadDim = 64;
constexpr std::int32_t kHidden = -(1 << 20);  // far below every score

constexpr std::int64_t kCellRows = 4;      // rows of a group: values of four rows are interleaved
constexpr std::int64_t kCellColumns = 16;  // columns are padded to, and read in, multiples of this
constexpr std::int64_t kDimQuad = 4;       // dimensions of a key that are interleaved
constexpr std::int64_t kBiasStride = 64;   // from one row of a bias table to the next
constexpr std::int64_t kMostGroups = 9;    // groups that a window of 31 rows can touch
constexpr std::int64_t kMostVectors = 2;   // multiples of 16 columns that are read of each row

// Keys and values of one image and one head. rows is a multiple of 4, columns of 16. The three
// start entries follow the grid, as a row of 16 cells in `key` and `key_sum` and as one column of
// four rows in `value`. `stage` marks cells without a key, which may hold any bytes.
struct HeadKeys {
  const std::int8_t* key;           // [rows][quads][columns][4], then [quads][16][4]; 0 beyond dims
  const std::int8_t* value;         // [rows / 4][columns][16 * value_blocks][4], then [..][4]
  const std::int32_t* key_sum;      // [rows][columns], then [16]: -128 * sum of the key
  const std::int32_t* stage;        // [rows][columns]: key_stage, the largest int32 without a key
  const std::int32_t* first_stage;  // [rows / 4]: the earliest of the group
  std::int64_t rows;
  std::int64_t columns;
  std::int64_t head_dim;
  std::int64_t quads;         // ceil(head_dim / 4)
  std::int64_t value_blocks;  // ceil(head_dim / 16)
};

// The biases of a head and its scaling of products.
struct HeadScores {
  const std::int32_t* window;  // [41][64]: bias of (dy, dx) at (dy + 20, dx + 31), else hidden
  const std::int32_t* start;   // [16]: bias of the start entries, hidden from the third on
  std::int32_t shift;          // 5 .. 12: products stay far above kHidden
  std::int32_t gain_bits;      // 0 .. 5
};

// The cells that a reader reads: `groups` x 4 rows of 16 * vectors columns inside the padded grid.
// They contain its window; cells outside the window have a hidden bias.
struct Sight {
  std::int32_t reads;         // it sees keys with stage <= reads
  std::int32_t first_row;     // a multiple of 4
  std::int32_t groups;        // 0 .. 9; 0: start entries only
  std::int32_t first_column;  // any
  std::int32_t vectors;       // 1 or 2
  std::int32_t bias;          // where its first cell is in HeadScores::window
};

// One entry that reads keys.
struct Reader {
  Sight sight;
  const std::int8_t*
      q;              // 4 * quads readable bytes in -127 .. 127; those beyond head_dim are ignored
  std::int8_t* mean;  // head_dim numbers in -127 .. 127, the result
};

struct AttentionKernels {
  void (*attend)(const HeadKeys& keys, const HeadScores& scores, const Reader* readers,
                 std::int64_t count);
  // The softmax weights of scores `distances` (>= 0) below the maximum, as `attend` computes them.
  void (*weigh)(const std::int32_t* distances, std::int64_t count, std::uint8_t* weights);
  // Consecutive readers of the same cells take less time together.
  bool pairs;
};

// floor(126.61 * 2^(-d / 16) + 1/2) for d = 0 .. 127; 0 beyond.
extern const std::uint8_t kAttentionWeights[128];

extern const AttentionKernels kAttentionScalar;
#if defined(PERCOV2_X86_KERNELS)
extern const AttentionKernels kAttentionAvx2;
extern const AttentionKernels kAttentionAvx512;
#elif defined(PERCOV2_NEON_KERNELS)
extern const AttentionKernels kAttentionNeon;
#endif

// The kernels of the active instruction set.
const AttentionKernels& attention_kernels();

}  // namespace percov2
