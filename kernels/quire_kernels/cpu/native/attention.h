#pragma once

#include <cstdint>
#include <vector>

#include "ops.h"

namespace quire {

struct Attention {
  Format format;     // of query and out
  Format kv_format;  // of the cache
  const void* query;  // [T, heads, head_dim]
  int64_t query_stride, heads, kv_heads, head_dim;
  const void* keys;    // [blocks][kv_heads][block_size slots], see attention.cpp
  const void* values;
  int64_t block_size;
  int64_t window;  // 0: none
  float scale;
  float softcap;       // of products that are multiplied by `scale`; 0: none
  const float* sinks;  // [heads], or null
  void* out;  // [T, heads, head_dim]
  int64_t out_stride;
  // the step
  int64_t sequences, table_width;
  const int32_t* block_tables;
  const int32_t* query_starts;
  const int32_t* contexts;
};

// Rows (token, head) of a sequence, as many of each of `kv_heads` key heads, over splits `first` to `last` of its keys.
struct AttentionTask {
  int32_t sequence, kv_head, kv_heads, first_row, rows, first, last;
  int64_t partial;  // where in `partials` what each split gives goes; -1: nowhere, the splits are merged at once
};

// Who does what. Tasks that would hold up the others are cut into their splits and merged afterwards.
struct AttentionPlan {
  AttentionPlan(const Attention& call, int threads);
  int64_t scratch(int threads) const;  // bytes

  std::vector<AttentionTask> pieces, cut;
  int64_t partials = 0;  // floats
  int64_t together = 1;  // key heads of a task at most
  int64_t head_dim;
};
void attention(Pool& pool, const Attention& call, const AttentionPlan& plan, void* scratch);

// Where keys and values are kept: [blocks][kv_heads][block_size slots], see attention.cpp.
struct Cache {
  Format format;
  int64_t kv_heads, head_dim, block_size;
  void* keys;
  void* values;
};
// A token's keys and values, [kv_heads, head_dim] each, to a slot.
void keep_token(const Cache& cache, Format format, const void* keys, const void* values, int64_t slot);

}  // namespace quire
