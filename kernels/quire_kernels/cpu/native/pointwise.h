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

}  // namespace quire
