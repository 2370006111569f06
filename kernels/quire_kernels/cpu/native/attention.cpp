// Paged attention, prompts and single tokens alike.
//
// Query heads that share a key head are rows of one tile, with the tokens next to them: a tile has up to kRows rows
// (token, head). Keys are taken kTile at a time. A block keeps its keys turned, one vector of tokens for each place of
// the head, so that products of a row with several keys are sums over vectors and nothing has to be added up across
// one. Softmax is kept as a running maximum and sum.
//
// Keys are cut at multiples of kTile from the first of the sequence, and rows do not mix: what comes out for a token
// depends on its own sequence alone.
#include "attention.h"

#include <algorithm>
#include <cmath>

#include "simd.h"

namespace quire {

namespace {

constexpr int kRows = 8;
constexpr int64_t kTile = 256;

struct Task {
  int32_t sequence, kv_head, first_row, rows;
};

// A row is a token of the step and one of the query heads of the task's key head.
template <class T, class KV>
struct Worker {
  const Attention& call;
  float* q;       // [kRows, head_dim], scaled
  float* scores;  // [kRows, kTile]
  float* out;     // [kRows, head_dim]

  void run(const Task& task) const {
    const int64_t dim = call.head_dim, size = call.block_size, group = call.heads / call.kv_heads;
    const int64_t begin = call.query_starts[task.sequence], count = call.query_starts[task.sequence + 1] - begin;
    const int64_t context = call.contexts[task.sequence];
    const int32_t* table = call.block_tables + task.sequence * call.table_width;
    int64_t limit[kRows], low[kRows];
    float most[kRows], total[kRows];
    int64_t from = context, to = 0;
    for (int r = 0; r < task.rows; ++r) {
      int64_t token = (task.first_row + r) / group, head = task.kv_head * group + (task.first_row + r) % group;
      const T* at = static_cast<const T*>(call.query) + (begin + token) * call.query_stride + head * dim;
      for (int64_t d = 0; d < dim; ++d) q[r * dim + d] = as_float(at[d]) * call.scale;
      limit[r] = context - count + token + 1;
      low[r] = call.window > 0 ? std::max<int64_t>(0, limit[r] - call.window) : 0;
      from = std::min(from, low[r]);
      to = std::max(to, limit[r]);
      most[r] = -INFINITY;
      total[r] = 0.0f;
    }
    std::fill(out, out + task.rows * dim, 0.0f);
    for (int64_t tile = from / kTile * kTile; tile < to; tile += kTile) {
      const int64_t first_block = std::max(from, tile) / size, last_block = (std::min(to, tile + kTile) - 1) / size;
      for (int64_t block = first_block; block <= last_block; ++block) {
        products(task, static_cast<const KV*>(call.keys) + (table[block] * call.kv_heads + task.kv_head) * dim * size,
                 block * size - tile);
      }
      for (int r = 0; r < task.rows; ++r) soften(r, tile, low[r], limit[r], most[r], total[r]);
      for (int64_t block = first_block; block <= last_block; ++block) {
        // what lies in slots without a token, or before what is seen, may not be a number
        const int64_t start = block * size, begin = std::max(std::max(from, tile), start) - start;
        const int64_t end = std::min(std::min(to, tile + kTile), start + size) - start;
        add_values(task,
                   static_cast<const KV*>(call.values) + (table[block] * call.kv_heads + task.kv_head) * dim * size,
                   start - tile, begin, end);
      }
    }
    for (int r = 0; r < task.rows; ++r) {
      int64_t token = (task.first_row + r) / group, head = task.kv_head * group + (task.first_row + r) % group;
      T* to_row = static_cast<T*>(call.out) + (begin + token) * call.out_stride + head * dim;
      Vec share = splat(1.0f / total[r]);
      for (int64_t d = 0; d < dim; d += kLanes) {
        int n = static_cast<int>(std::min<int64_t>(kLanes, dim - d));
        store(to_row + d, load(out + r * dim + d, n) * share, n);
      }
    }
  }

  // Tokens of a block that lie in the tile: scores[r, at + j] = q[r] · keys[j].
  void products(const Task& task, const KV* keys, int64_t at) const {
    const int64_t size = call.block_size, dim = call.head_dim;
    // a block may begin before the tile or end behind it
    const int64_t end = std::min(size, kTile - at);
    for (int64_t j = std::max<int64_t>(0, -at); j < end; j += kLanes) {
      int n = static_cast<int>(std::min<int64_t>(kLanes, end - j));
      Vec acc[kRows];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) acc[r] = zero();
      for (int64_t d = 0; d < dim; ++d) {
        Vec k = n == kLanes ? load(keys + d * size + j) : load(keys + d * size + j, n);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) acc[r] = fma(splat(q[r * dim + d]), k, acc[r]);
      }
      for (int r = 0; r < task.rows; ++r) store(scores + r * kTile + at + j, acc[r], n);
    }
  }

  // Scores of a tile to weights, those that the row does not see to 0; what was added up before is scaled.
  void soften(int r, int64_t tile, int64_t low, int64_t limit, float& most, float& total) const {
    const int64_t dim = call.head_dim;
    float* row = scores + r * kTile;
    int64_t first = std::clamp<int64_t>(low - tile, 0, kTile), last = std::clamp<int64_t>(limit - tile, 0, kTile);
    if (first >= last) {
      std::fill(row, row + kTile, 0.0f);
      return;
    }
    Vec top = splat(most);
    int64_t j = first;
    for (; j + kLanes <= last; j += kLanes) top = max(top, load(row + j));
    float now = largest(top);
    for (; j < last; ++j) now = std::max(now, row[j]);
    if (now != most) {
      float keep = std::exp(most - now);
      total *= keep;
      for (int64_t d = 0; d < dim; ++d) out[r * dim + d] *= keep;
      most = now;
    }
    std::fill(row, row + first, 0.0f);
    Vec base = splat(now), added = zero();
    for (j = first; j < last; j += kLanes) {
      int n = static_cast<int>(std::min<int64_t>(kLanes, last - j));
      Vec weight = exp(load(row + j, n) - base);
      store(row + j, weight, n);
      added = added + load(row + j, n);
    }
    total += sum(added);
    std::fill(row + last, row + kTile, 0.0f);
  }

  // out[r] += Σ_j weight[r, j] · values[j], for tokens `begin` to `end` of a block that begins at `at` of the tile.
  void add_values(const Task& task, const KV* values, int64_t at, int64_t begin, int64_t end) const {
    const int64_t dim = call.head_dim;
    for (int64_t d = 0; d < dim; d += kLanes) {
      int n = static_cast<int>(std::min<int64_t>(kLanes, dim - d));
      Vec acc[kRows];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) acc[r] = load(out + r * dim + d, n);
      for (int64_t j = begin; j < end; ++j) {
        Vec v = n == kLanes ? load(values + j * dim + d) : load(values + j * dim + d, n);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) acc[r] = fma(splat(scores[r * kTile + at + j]), v, acc[r]);
      }
      for (int r = 0; r < task.rows; ++r) store(out + r * dim + d, acc[r], n);
    }
  }
};

template <class T, class KV>
void attend(Pool& pool, const Attention& call, float* scratch) {
  const int64_t group = call.heads / call.kv_heads, dim = call.head_dim;
  std::vector<Task> tasks;
  for (int64_t s = 0; s < call.sequences; ++s) {
    int64_t rows = (call.query_starts[s + 1] - call.query_starts[s]) * group;
    for (int64_t row = 0; row < rows; row += kRows)
      for (int64_t head = 0; head < call.kv_heads; ++head)
        tasks.push_back({static_cast<int32_t>(s), static_cast<int32_t>(head), static_cast<int32_t>(row),
                         static_cast<int32_t>(std::min<int64_t>(kRows, rows - row))});
  }
  const int64_t room = kRows * (2 * dim + kTile);
  pool.each(static_cast<int64_t>(tasks.size()), [&](int64_t number, int thread) {
    float* mine = scratch + thread * room;
    Worker<T, KV>{call, mine, mine + kRows * dim, mine + kRows * (dim + kTile)}.run(tasks[number]);
  });
}

template <class KV>
void attend_to(Pool& pool, const Attention& call, float* scratch) {
  switch (call.format) {
    case kFloat32: return attend<float, KV>(pool, call, scratch);
    case kBfloat16: return attend<bf16, KV>(pool, call, scratch);
    default: return attend<fp16, KV>(pool, call, scratch);
  }
}

template <class T, class KV>
void keep(Pool& pool, const WriteKV& call) {
  const int64_t dim = call.head_dim, size = call.block_size;
  pool.each(call.rows, [&](int64_t row, int) {
    int64_t block = call.slots[row] / size, at = call.slots[row] % size;
    for (int64_t head = 0; head < call.kv_heads; ++head) {
      const T* key = static_cast<const T*>(call.key) + row * call.key_stride + head * dim;
      const T* value = static_cast<const T*>(call.value) + row * call.value_stride + head * dim;
      KV* keys = static_cast<KV*>(call.keys) + (block * call.kv_heads + head) * dim * size + at;
      KV* values = static_cast<KV*>(call.values) + (block * call.kv_heads + head) * dim * size + at * dim;
      for (int64_t d = 0; d < dim; d += kLanes) {
        int n = static_cast<int>(std::min<int64_t>(kLanes, dim - d));
        KV turned[kLanes];
        store(turned, load(key + d, n), n);
        for (int i = 0; i < n; ++i) keys[(d + i) * size] = turned[i];
        store(values + d, load(value + d, n), n);
      }
    }
  });
}

template <class KV>
void keep_in(Pool& pool, const WriteKV& call) {
  switch (call.format) {
    case kFloat32: return keep<float, KV>(pool, call);
    case kBfloat16: return keep<bf16, KV>(pool, call);
    default: return keep<fp16, KV>(pool, call);
  }
}

}  // namespace

int64_t attention_scratch(int threads, int64_t head_dim) {
  return threads * kRows * (2 * head_dim + kTile) * static_cast<int64_t>(sizeof(float));
}

void attention(Pool& pool, const Attention& call, void* scratch) {
  float* room = static_cast<float*>(scratch);
  switch (call.kv_format) {
    case kFloat32: return attend_to<float>(pool, call, room);
    case kBfloat16: return attend_to<bf16>(pool, call, room);
    default: return attend_to<fp16>(pool, call, room);
  }
}

void write_kv(Pool& pool, const WriteKV& call) {
  switch (call.kv_format) {
    case kFloat32: return keep_in<float>(pool, call);
    case kBfloat16: return keep_in<bf16>(pool, call);
    default: return keep_in<fp16>(pool, call);
  }
}

}  // namespace quire
