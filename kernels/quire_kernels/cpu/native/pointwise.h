#pragma once

#include <cstdint>

#include "ops.h"

namespace quire {

// Rows of rows: [rows, heads, width], with a stride for either.
struct Grid {
  int64_t rows, heads, width;
};

void rms_norm(Pool& pool, Format format, Grid grid, const void* x, int64_t row_stride, int64_t head_stride,
              const void* weight, float eps, void* out);  // out is dense
void add_rms_norm(Pool& pool, Format format, int64_t rows, int64_t width, const void* x, int64_t x_stride,
                  void* residual, int64_t residual_stride, const void* weight, float eps, void* out);
void rotary(Pool& pool, Format format, Grid grid, const void* x, int64_t row_stride, int64_t head_stride,
            const float* cos, const float* sin, void* out);
void silu_mul(Pool& pool, Format format, int64_t rows, int64_t width, const void* gate_up, int64_t stride, void* out);
// Of each row its largest number and the lowest place of it; not a number if one of them is none.
void largest(Pool& pool, const float* logits, int64_t stride, int64_t rows, int64_t width, float* values,
             int64_t* places, void* scratch);
int64_t largest_scratch(int64_t rows, int64_t width);
// -inf for every token of the rows `rows` whose bit is not set.
void mask_tokens(Pool& pool, float* logits, int64_t stride, int64_t width, const int64_t* rows, int64_t count,
                 const uint8_t* bits, int64_t bits_stride);

}  // namespace quire
