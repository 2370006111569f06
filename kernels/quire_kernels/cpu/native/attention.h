#pragma once

#include <cstdint>

#include "ops.h"

namespace quire {

struct Attention {
  Format format;     // of query and out
  Format kv_format;  // of the cache
  const void* query;  // [T, heads, head_dim]
  int64_t query_stride, heads, kv_heads, head_dim;
  const void* keys;    // [blocks][kv_heads][head_dim][block_size]
  const void* values;  // [blocks][kv_heads][block_size][head_dim]
  int64_t block_size;
  int64_t window;  // 0: none
  float scale;
  void* out;  // [T, heads, head_dim]
  int64_t out_stride;
  // the step
  int64_t sequences, table_width;
  const int32_t* block_tables;
  const int32_t* query_starts;
  const int32_t* contexts;
};

int64_t attention_scratch(int threads, int64_t head_dim);
void attention(Pool& pool, const Attention& call, void* scratch);

// This step's keys and values [T, kv_heads, head_dim] to their slots.
struct WriteKV {
  Format format, kv_format;
  const void* key;
  const void* value;
  int64_t key_stride, value_stride, rows, kv_heads, head_dim, block_size;
  const int64_t* slots;
  void* keys;
  void* values;
};
void write_kv(Pool& pool, const WriteKV& call);

}  // namespace quire
