#pragma once

#include <cstdint>

#include "ops.h"

namespace quire {

struct QuantizedLinear {
  int64_t rows;
  Format format;  // of x
  const void* x;  // [rows, width]
  int64_t stride, width;
  const uint8_t* weight;  // as `pack_quantized` made it
  const void* scales;     // float32 [outputs]; with groups bfloat16, packed like a weight [outputs, width / group]
  int64_t group;          // inputs that share a scale, in 4 bits; 0: 8 bits, one scale for an output
  const float* bias;      // [outputs], or null
  int64_t outputs;
  int64_t round_input;  // whether rows of x are rounded to 8 bits
  Format out_format;
  void* out;  // [rows, outputs]
  int64_t out_stride;
};

// In 8 bits `weight` is [outputs, width] with a sign, in 4 bits [outputs, width / 2] in pairs; row-major, to the order
// that `quantized_linear` reads, in place. The bytes of a row are a multiple of 4.
void pack_quantized(Pool& pool, void* weight, int64_t outputs, int64_t row_bytes, bool four_bits, void* scratch);
int64_t pack_quantized_scratch(int threads, int64_t row_bytes);

// Rows of a packed weight as what they stand for.
struct UnpackQuantized {
  int64_t rows;
  Format format;  // of out
  const uint8_t* weight;
  const void* scales;
  int64_t group, outputs, width;
  const int64_t* ids;  // [rows]
  void* out;           // [rows, width]
};
void unpack_quantized(Pool& pool, const UnpackQuantized& call);
int64_t quantized_scratch(int threads, const QuantizedLinear& call);
void quantized_linear(Pool& pool, const QuantizedLinear& call, void* scratch);

}  // namespace quire
