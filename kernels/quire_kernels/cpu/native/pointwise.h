#pragma once

#include <cstdint>

#include "attention.h"
#include "ops.h"

namespace quire {

// x / sqrt(mean(x²) + eps) · weight, which is in the format of x or in float32. Tensors without a stride are dense.
struct RmsNorm {
  int64_t rows;
  Format format;
  const void* x;  // [rows, width]
  int64_t stride, width;
  Format weight_format;
  const void* weight;
  double eps;
  void* out;
};
void rms_norm(Pool& pool, const RmsNorm& call);

// The same of x + residual, which stays in the residual.
struct AddRmsNorm {
  int64_t rows;
  Format format;
  const void* x;  // [rows, width]
  int64_t stride, width;
  void* residual;
  int64_t residual_stride;
  Format weight_format;
  const void* weight;
  double eps;
  void* out;
};
void add_rms_norm(Pool& pool, const AddRmsNorm& call);

// Cosines and signed sines of position · frequency.
struct Turns {
  int64_t rows;
  const int64_t* positions;
  const float* frequencies;  // [width / 2]
  int64_t width;
  double factor;
  float *cos, *sin;  // [rows, width]
};
void turns(Pool& pool, const Turns& call);

// Norms of queries and keys, if they have weights, then rotation; keys and values go to the cache.
struct PlaceHeads {
  int64_t rows;
  Format format;
  const void* qkv;  // [rows, heads + 2 · kv_heads, head_dim]
  int64_t stride, heads;
  Format norm_format;                 // as of `RmsNorm`
  const void *query_norm, *key_norm;  // [head_dim] each, or null
  double eps;
  const float *cos, *sin;  // [rows, head_dim], the first half of the sines negated
  const int64_t* slots;
  Cache cache;
  void* out;  // [rows, heads, head_dim]
};
void place_heads(Pool& pool, const PlaceHeads& call, void* scratch);
int64_t place_heads_scratch(int threads, const PlaceHeads& call);

// An MLP's gate, through silu or through gelu as tanh approximates it, times what lies behind it.
struct Gate {
  int64_t rows;
  Format format;
  const void* gate_up;  // [rows, 2 · width]
  int64_t stride, width;
  void* out;
};
void silu_mul(Pool& pool, const Gate& call);
void gelu_mul(Pool& pool, const Gate& call);

// x · factor, in place.
struct Multiply {
  int64_t rows;
  Format format;
  void* x;  // [rows, width]
  int64_t stride, width;
  double factor;
};
void multiply(Pool& pool, const Multiply& call);

// Some rows of x, as bytes.
struct Take {
  int64_t rows;
  const void* x;
  int64_t stride, width;
  const int64_t* ids;  // [rows]
  void* out;
};
void take(Pool& pool, const Take& call);

// Of each row its largest number and the lowest place of it; not a number if one of them is none.
struct Largest {
  int64_t rows;
  const float* logits;
  int64_t stride, width;
  float* values;
  int64_t* places;
};
void largest(Pool& pool, const Largest& call, void* scratch);
struct Peak {
  float value;
  int64_t place;
};
Peak peak(const float* row, int64_t begin, int64_t end);  // of a part of one
int64_t largest_scratch(const Largest& call);

// cap · tanh(x / cap), in place.
struct CapLogits {
  int64_t rows;
  float* logits;
  int64_t stride, width;
  double cap;
};
void cap_logits(Pool& pool, const CapLogits& call);

// -inf for every token of the rows `ids` whose bit is not set.
struct MaskTokens {
  int64_t rows;
  float* logits;
  int64_t stride, width;
  const int64_t* ids;
  const uint8_t* bits;
  int64_t bits_stride;
};
void mask_tokens(Pool& pool, const MaskTokens& call);

}  // namespace quire
