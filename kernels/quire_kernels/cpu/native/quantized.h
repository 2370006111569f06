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

// What `quantized_linear` is made of, for who chooses rows and outputs himself. Rows of x as they are multiplied, in whole
// numbers or as float32:
struct MadeRows {
  int64_t count, width, groups;
  int64_t stride;  // numbers from one row to the next; zeros up to there
  int8_t* codes;   // [count, stride]
  int32_t* start;  // [count, groups]: where the sums of a row begin
  float* scale;    // [count]
  float* wide;     // [count, stride]

  // Room for `count` rows of such calls at `memory`, of which `bytes` are needed.
  MadeRows(const QuantizedLinear& call, int64_t count, void* memory);
  static int64_t bytes(const QuantizedLinear& call, int64_t count);
  // The `some` rows from `first` on.
  MadeRows part(int64_t first, int64_t some) const;
};
void make_row(const QuantizedLinear& call, const void* from, const MadeRows& rows, int64_t row);
// One panel of outputs, of rows that are made so; `apart`: panels from one that a thread takes to the next, as a rule.
// `room` is the thread's own, as much as `quantized_room` says for that many rows or more.
void quantized_panel(const QuantizedLinear& call, const MadeRows& rows, int64_t number, int64_t apart, void* room);
int64_t quantized_room(const QuantizedLinear& call, int64_t rows);

}  // namespace quire
