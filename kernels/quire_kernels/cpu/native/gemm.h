#pragma once

#include <cstdint>

#include "ops.h"

namespace quire {

struct Linear {
  int64_t rows;
  Format format;  // of x, weight and bias
  const void* x;  // [rows, width]
  int64_t stride, width;
  const void* weight;  // as `pack` made it
  const void* bias;    // [outputs], or null
  int64_t outputs;
  Format out_format;
  void* out;  // [rows, outputs]
  int64_t out_stride;
};

// `weight` [outputs, width], row-major, to the order that `linear` reads, in place.
void pack(Pool& pool, Format format, void* weight, int64_t outputs, int64_t width, void* scratch);
int64_t pack_scratch(int threads, Format format, int64_t width);

// Rows of a packed weight as they were: what an embedding that is the head, too, looks up.
struct UnpackRows {
  int64_t rows;
  Format format;
  const void* weight;
  int64_t outputs, width;
  const int64_t* ids;  // [rows]
  void* out;           // [rows, width]
};
void unpack_rows(Pool& pool, const UnpackRows& call);
int64_t linear_scratch(Format format, int64_t rows, int64_t width);
void linear(Pool& pool, const Linear& call, void* scratch);

// What `linear` is made of, for who chooses rows and outputs himself. A row as it is multiplied is float32, or bfloat16
// where the processor has products of its pairs.
int64_t made_row_bytes(Format format, int64_t width);
void make_row(Format format, const void* from, int64_t width, void* to);
// One panel of outputs, of rows that are made so; `apart`: panels from one that a thread takes to the next, as a rule.
void linear_panel(const Linear& call, int64_t number, int64_t apart);

}  // namespace quire
