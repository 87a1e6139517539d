// The batch coder on CUDA devices: raw device pointers, sizes and a stream go in. It allocates
// nothing and never waits for the device. The same kernels serve the GPU and the tests' emulation
// of its threads.
//
// The host checks what it knows and throws std::invalid_argument. The device checks intervals,
// counts, states and offsets and gives each stream a status. A stream whose status is not kOk has
// read and written nothing outside its own memory.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace percov2 {

// The fault that a kernel found in one stream.
enum CudaStatus : std::int32_t {
  kOk = 0,
  kBadInterval = 1,  // an interval is empty or not inside 0 .. 2^prob_bits; the stream is empty
  kBadCount = 2,     // counts[b] is not in 0 .. symbols; the stream is empty
  kBadCheck = 3,     // the check exceeds 16 bits; the stream is empty
  kBufferFull = 4,   // the stream ends beyond the capacity; the offsets have the needed size
  kBadOffsets = 5,   // the stream does not lie in the buffer; its symbols are 0
  kBadState = 6,     // the state is not below 2^31; its symbols are 0
  kBadPosition = 7,  // the position is not in the stream; its symbols are 0
  kBadRows = 8,      // its rows are not among those of all streams; it decodes nothing
};

// The target of a launch.
struct CudaQueue {
  int device;    // ordinal of the runtime
  void* stream;  // cudaStream_t of that device; null is the legacy default stream
};

// Encodes `streams` streams of up to `symbols` symbols each.
struct EncodeTask {
  std::int64_t streams;
  std::int64_t symbols;        // per stream
  int prob_bits;               // 8 to 20
  const std::int32_t* starts;  // [streams, symbols], in decoding order
  const std::int32_t* freqs;   // [streams, symbols]
  const std::int32_t* counts;  // [streams]: only the first counts[b] of a row; null: all
  const std::int32_t* checks;  // [streams], 0 .. 65535: the initial states
  std::uint8_t* scratch;       // encode_scratch_bytes(streams, symbols), 16-byte aligned
  std::uint8_t* packed;        // packed_head_bytes(streams) + capacity, 16-byte aligned
  std::int64_t capacity;       // room for the streams in `packed`
};

// The head of `packed`; the streams follow one after another. So the host needs a single copy.
struct PackedHead {
  std::int64_t* offsets;  // [streams + 1]: where each stream begins, counted from the first
  std::int32_t* status;   // [streams]: CudaStatus
  std::int32_t* quiet;    // [streams]: BatchEncoder::symbols_before_output
};

std::int64_t encode_scratch_bytes(std::int64_t streams, std::int64_t symbols);
std::int64_t packed_head_bytes(std::int64_t streams);
// A capacity that is always enough.
std::int64_t packed_most_bytes(std::int64_t streams, std::int64_t symbols);
PackedHead packed_head(std::uint8_t* packed, std::int64_t streams);

// Two launches. The bytes are those of BatchEncoder.
void encode_streams(const EncodeTask& task, const CudaQueue& queue);

// Decodes `symbols` symbols of each of `streams` streams. With `rows`, the streams share `symbols`
// rows of logits and symbols, and stream b decodes those from rows[b] up to rows[b + 1].
struct DecodeTask {
  std::int64_t streams;
  std::int64_t symbols;        // per stream, or of all; 0 only shifts due bytes in
  std::int64_t codebook;       // 2 to 8192, at most half of 2^prob_bits
  int prob_bits;               // 8 to 20
  const std::int64_t* rows;    // [streams + 1]; null: `symbols` rows for each stream
  const std::int16_t* logits;  // [streams, symbols, codebook]: base 2, 1/256 of an octave
  const std::uint8_t* bytes;   // [size]: the streams
  std::int64_t size;
  const std::int64_t* offsets;  // [streams + 1]: stream b is bytes[offsets[b] .. offsets[b + 1])
  std::int32_t* states;         // [streams], below 2^31; 0 before the first symbol
  std::int64_t* positions;      // [streams]: the next byte of each, counted from its beginning
  std::int32_t* decoded;        // [streams, symbols]
  std::int32_t* status;         // [streams]: CudaStatus
};

// One launch. Symbols, states and positions are those of BatchDecoder.
void decode_stage(const DecodeTask& task, const CudaQueue& queue);

// Names of the devices of the runtime; empty without a driver (devices_cuda.cu).
std::vector<std::string> cuda_devices();

}  // namespace percov2
