// Paged attention, prompts and single tokens alike.
//
// Query heads that share a key head are rows of one tile, with the tokens next to them: a tile has up to kRows rows
// (token, head). Keys are taken kTile at a time, softmax is kept as a running maximum and sum. A block of P slots keeps
// keys and values of a head of D numbers as
//
//     keys      float32, float16    [D][P]            so that products of a row with several keys are sums over vectors
//               bfloat16            [D / 2][P][2]     pairs, which is what vdpbf16ps takes
//               int8                [D / 4][P][4]     number + 128, fours, which is what vpdpbusd takes
//     values    all                 [P][D]
//
// In 8 bits each token's key and value have a scale of their own (round.h), float32 [P] behind the block's numbers.
// Queries are rounded likewise where they meet such keys, so that their products are of whole numbers and exact; values
// are widened in registers.
//
// Every kSplit keys, counted from the first of the sequence, softmax begins anew, and what the splits give is merged in
// order. A long sequence is so shared among threads without a change of any number: whoever computes a split, and whether
// it is kept for a while or merged at once, the same is done with the same. Rows do not mix. What comes out for a token
// depends on its own sequence alone.
#include "attention.h"

#include <algorithm>
#include <cmath>

#include "round.h"
#include "simd.h"

namespace quire {

namespace {

constexpr int kRows = 8;
constexpr int64_t kTile = 256;
constexpr int64_t kSplit = 4 * kTile;
constexpr int64_t kPartials = 1 << 22;  // floats that wait to be merged at most
constexpr int kVecs = sizeof(Vec) == 64 ? 2 : 1;  // that a row has sums in: half the registers for kRows

#if defined(__AVX512BF16__)
constexpr bool kDotPairs = true;
inline Vec dot(Vec acc, Pair keys, int32_t two) {
  return {_mm512_dpbf16_ps(acc.v, reinterpret_cast<__m512bh>(_mm512_set1_epi32(two)),
                           reinterpret_cast<__m512bh>(keys.v))};
}
#else
constexpr bool kDotPairs = false;
inline Vec dot(Vec acc, Pair, int32_t) { return acc; }
#endif

// Numbers of a key that lie together.
template <class KV>
constexpr int kTogether = std::is_same_v<KV, bf16> ? 2 : std::is_same_v<KV, int8_t> ? 4 : 1;
template <class KV>
constexpr bool kScaled = std::is_same_v<KV, int8_t>;

// Numbers of a block and head with what scales they have, in bytes.
template <class KV>
int64_t block_bytes(int64_t dim, int64_t size) {
  return dim * size * static_cast<int64_t>(sizeof(KV)) + (kScaled<KV> ? size * 4 : 0);
}

inline Vec some(const float* p, int n) { return n == kLanes ? load(p) : load(p, n); }
inline void put(float* p, Vec a, int n) { n == kLanes ? store(p, a) : store(p, a, n); }

// Softmax over some keys: its maximum, the sum of its weights, and Σ weight · value [dim].
struct Softmax {
  float *most, *total, *out;

  void clear(int64_t rows, int64_t dim) const {
    std::fill_n(most, rows, -INFINITY);
    std::fill_n(total, rows, 0.0f);
    std::fill_n(out, rows * dim, 0.0f);
  }
  static int64_t size(int64_t rows, int64_t dim) { return rows * (dim + 2); }
  static Softmax at(float* p, int64_t rows) { return {p, p + rows, p + 2 * rows}; }
};

// Not inlined: there is one code for it, so that it rounds the same whoever calls.
[[gnu::noinline]] void merge(const Softmax& all, const Softmax& more, int64_t rows, int64_t dim) {
  for (int64_t r = 0; r < rows; ++r) {
    if (more.total[r] == 0.0f) continue;  // a row that sees no key of the split
    float most = std::max(all.most[r], more.most[r]);
    Vec keep = splat(std::exp(all.most[r] - most)), add = splat(std::exp(more.most[r] - most));
    for (int64_t d = 0; d < dim; d += kLanes) {
      int n = static_cast<int>(std::min<int64_t>(kLanes, dim - d));
      float* to = all.out + r * dim + d;
      put(to, fma(some(more.out + r * dim + d, n), add, some(to, n) * keep), n);
    }
    Vec total = fma(splat(more.total[r]), add, splat(all.total[r]) * keep);
    store(&all.total[r], total, 1);
    all.most[r] = most;
  }
}

template <class Do>
void with(Format format, Do&& act) {
  format == kFloat32 ? act(float{}) : format == kBfloat16 ? act(bf16{}) : act(fp16{});
}

// A row is a token of the step and one of the query heads of the task's key head. `Dot`: queries stay in bfloat16 and
// meet keys in vdpbf16ps.
template <class KV, bool Dot>
struct Worker {
  static constexpr int kWide = kTogether<KV>;
  static constexpr bool kCommon = kScaled<KV> || (std::is_same_v<KV, bf16> && Dot == kDotPairs);  // worth code for all

  const Attention& call;
  float* scores;        // [kRows, kTile]
  float* key_scale;     // [kTile]
  float* value_scale;   // [kTile]
  Softmax split, all;   // kRows
  float* wide;          // [head_dim, kRows]: queries as float32
  int32_t* packed;      // the same place, [head_dim / kWide, kRows]: two in bfloat16, or four in 8 bits
  int32_t start[kRows] = {};
  float factor[kRows] = {};  // of what products give

  static int64_t size(int64_t dim) { return kRows * kTile + 2 * kTile + 2 * Softmax::size(kRows, dim) + kRows * dim; }

  Worker(const Attention& call, float* room) : call(call) {
    scores = room;
    key_scale = scores + kRows * kTile;
    value_scale = key_scale + kTile;
    split = Softmax::at(value_scale + kTile, kRows);
    all = Softmax::at(value_scale + kTile + Softmax::size(kRows, call.head_dim), kRows);
    wide = value_scale + kTile + 2 * Softmax::size(kRows, call.head_dim);
    packed = reinterpret_cast<int32_t*>(wide);
  }

  void run(const AttentionTask& task, float* partials) {
    if constexpr (kCommon) {
      switch (task.rows) {
        case 1: return rows<1>(task, partials);
        case 2: return rows<2>(task, partials);
        case 3: return rows<3>(task, partials);
        case 4: return rows<4>(task, partials);
        case 5: return rows<5>(task, partials);
        case 6: return rows<6>(task, partials);
        case 7: return rows<7>(task, partials);
      }
    }
    rows<kRows>(task, partials);
  }

  // What is computed is `Rows` of them, those that are too many for nothing.
  template <int Rows>
  void rows(const AttentionTask& task, float* partials) {
    const int64_t dim = call.head_dim, size = call.block_size;
    const int64_t begin = call.query_starts[task.sequence], count = call.query_starts[task.sequence + 1] - begin;
    const int64_t context = call.contexts[task.sequence];
    const int32_t* table = call.block_tables + task.sequence * call.table_width;
    int64_t limit[kRows], low[kRows], from = context, to = 0;
    // numbers that are left over may be so small that each product takes a hundred times as long
    if (task.rows < kRows) std::fill_n(wide, dim * kRows, 0.0f);
    for (int r = 0; r < task.rows; ++r) {
      with(call.format, [&]<class T>(T) {
        take_query(r, row_at(static_cast<const T*>(call.query), call.query_stride, begin, task, r));
      });
      int64_t token = (task.first_row + r) / (call.heads / call.kv_heads);
      limit[r] = context - count + token + 1;
      low[r] = call.window > 0 ? std::max<int64_t>(0, limit[r] - call.window) : 0;
      from = std::min(from, low[r]);
      to = std::max(to, limit[r]);
    }
    auto place = [&](const void* side, int64_t block) {
      return static_cast<const char*>(side) +
             (table[block] * call.kv_heads + task.kv_head) * block_bytes<KV>(dim, size);
    };
    all.clear(task.rows, dim);
    const int64_t end_block = (to - 1) / size;
    for (int64_t number = task.first; number < task.last; ++number) {
      const int64_t first = std::max(from, number * kSplit), last = std::min(to, (number + 1) * kSplit);
      split.clear(Rows, dim);
      for (int64_t tile = first / kTile * kTile; tile < last; tile += kTile) {
        const int64_t tile_from = std::max(first, tile), tile_to = std::min(last, tile + kTile);
        const int64_t first_block = tile_from / size, last_block = (tile_to - 1) / size;
        for (int64_t block = first_block; block <= last_block; ++block) {
          const int64_t at = block * size;
          const char *keys = place(call.keys, block), *values = place(call.values, block);
          if constexpr (kScaled<KV>) {
            const int64_t j = std::max(at, tile) - at, n = std::min(at + size, tile + kTile) - at - j;
            std::memcpy(key_scale + at + j - tile, keys + (dim * size + j * 4), n * 4);
            std::memcpy(value_scale + at + j - tile, values + (dim * size + j * 4), n * 4);
          }
          products<Rows>(reinterpret_cast<const KV*>(keys), at - tile, values);
        }
        for (int r = 0; r < task.rows; ++r) soften(r, low[r] - tile, limit[r] - tile);
        // what lies in slots without a token, or before what is seen, may not be a number
        int64_t d = 0;
        for (; d + kVecs * kLanes <= dim; d += kVecs * kLanes)
          add_values<Rows, kVecs, true>(place, end_block, tile, tile_from, tile_to, d, kLanes);
        for (; d < dim; d += kLanes)
          add_values<Rows, 1, false>(place, end_block, tile, tile_from, tile_to, d,
                                     static_cast<int>(std::min<int64_t>(kLanes, dim - d)));
      }
      if (task.partial >= 0) {
        Softmax kept = Softmax::at(partials + task.partial, task.rows);
        std::copy_n(split.most, task.rows, kept.most);
        std::copy_n(split.total, task.rows, kept.total);
        std::copy_n(split.out, task.rows * dim, kept.out);
      } else {
        merge(all, split, task.rows, dim);
      }
    }
    if (task.partial < 0) finish(task);
  }

  template <class P>
  P* row_at(P* tensor, int64_t stride, int64_t begin, const AttentionTask& task, int r) const {
    const int64_t group = call.heads / call.kv_heads, number = task.first_row + r;
    return tensor + (begin + number / group) * stride + (task.kv_head * group + number % group) * call.head_dim;
  }

  // What is in `all` to where it belongs.
  void finish(const AttentionTask& task) const {
    const int64_t dim = call.head_dim;
    with(call.format, [&]<class T>(T) {
      for (int r = 0; r < task.rows; ++r) {
        T* to = row_at(static_cast<T*>(call.out), call.out_stride, call.query_starts[task.sequence], task, r);
        Vec share = splat(1.0f / all.total[r]);
        for (int64_t d = 0; d < dim; d += kLanes) {
          int n = static_cast<int>(std::min<int64_t>(kLanes, dim - d));
          store(to + d, some(all.out + r * dim + d, n) * share, n);
        }
      }
    });
  }

  void merge_splits(const AttentionTask& task, float* partials) const {
    const int64_t dim = call.head_dim, each = Softmax::size(task.rows, dim);
    all.clear(task.rows, dim);
    for (int64_t number = 0; number < task.last - task.first; ++number)
      merge(all, Softmax::at(partials + task.partial + number * each, task.rows), task.rows, dim);
    finish(task);
  }

  template <class T>
  void take_query(int r, const T* at) {
    const int64_t dim = call.head_dim;
    factor[r] = call.scale;
    if constexpr (kScaled<KV>) {
      float scale;
      int8_t* codes = reinterpret_cast<int8_t*>(scores);  // which are not there yet
      round_row(at, dim, dim, 128, dim, codes, start + r, &scale);
      factor[r] *= scale;
      for (int64_t d = 0; d < dim; d += 4) packed[d / 4 * kRows + r] = four_codes(codes + d);
    } else if constexpr (Dot) {
      for (int64_t d = 0; d < dim; d += 2) std::memcpy(packed + d / 2 * kRows + r, at + d, 4);
    } else {
      for (int64_t d = 0; d < dim; ++d) wide[d * kRows + r] = as_float(at[d]);
    }
  }

  // Tokens of a block that lie in the tile: scores[r, at + j] = q[r] · keys[j]. `next` is read soon.
  template <int Rows>
  void products(const KV* keys, int64_t at, const char* next) const {
    // a block may begin before the tile or end behind it
    const int64_t end = std::min(call.block_size, kTile - at);
    for (int64_t j = std::max<int64_t>(0, -at); j < end; j += kLanes) {
      int n = static_cast<int>(std::min<int64_t>(kLanes, end - j));
      n == kLanes ? some_products<Rows, true>(keys, j, n, at, next) : some_products<kRows, false>(keys, j, n, at, next);
    }
  }

  template <int Rows, bool Whole>
  void some_products(const KV* keys, int64_t j, int n, int64_t at, const char* next) const {
    using Sum = std::conditional_t<kScaled<KV>, Ints, Vec>;
    const int64_t size = call.block_size, dim = call.head_dim;
    // two sums of each row where there are registers for them, for one is ready too late
    Sum sums[kVecs][Rows];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) {
        if constexpr (kScaled<KV>) {
          sums[v][r] = splat(v == 0 ? start[r] : int32_t{0});
        } else {
          sums[v][r] = zero();
        }
      }
    }
    auto step = [&](Sum(&acc)[Rows], int64_t d) {
      const KV* from = keys + d * size + j * kWide;
      _mm_prefetch(next + (d * size + j * kWide) * static_cast<int64_t>(sizeof(KV)), _MM_HINT_T1);
      if constexpr (kScaled<KV>) {
        Weights k = weights(Whole ? load_ints(from) : load_ints(from, n));
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) acc[r] = dot(acc[r], k, inputs(packed[d / 4 * kRows + r]));
      } else if constexpr (Dot) {
        Pair k = Whole ? load_pair(from) : load_pair(from, n);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) acc[r] = dot(acc[r], k, packed[d / 2 * kRows + r]);
      } else if constexpr (kWide == 2) {
        Pair k = Whole ? load_pair(from) : load_pair(from, n);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
          acc[r] = fma(splat(wide[d * kRows + r]), even(k), acc[r]);
          acc[r] = fma(splat(wide[(d + 1) * kRows + r]), odd(k), acc[r]);
        }
      } else {
        Vec k = Whole ? load(from) : load(from, n);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) acc[r] = fma(splat(wide[d * kRows + r]), k, acc[r]);
      }
    };
    int64_t d = 0;
    for (; d + kVecs * kWide <= dim; d += kVecs * kWide) {
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) step(sums[v], d + v * kWide);
    }
    if (d < dim) step(sums[0], d);
    for (int r = 0; r < Rows; ++r) {
      Sum sum = kVecs == 1 ? sums[0][r] : sums[0][r] + sums[kVecs - 1][r];
      if constexpr (kScaled<KV>) {
        put(scores + r * kTile + at + j, to_float(sum), n);
      } else {
        put(scores + r * kTile + at + j, sum, n);
      }
    }
  }

  // Products of a tile to weights, those of keys that the row does not see to 0; what was added up before is scaled.
  // The row sees `low` to `limit` of the tile.
  void soften(int r, int64_t low, int64_t limit) const {
    const int64_t dim = call.head_dim;
    float* row = scores + r * kTile;
    int64_t first = std::clamp<int64_t>(low, 0, kTile), last = std::clamp<int64_t>(limit, 0, kTile);
    if (first >= last) {
      std::fill(row, row + kTile, 0.0f);
      return;
    }
    const Vec scale = splat(factor[r]);
    float most = split.most[r];
    Vec top = splat(most);
    for (int64_t j = first; j < last; j += kLanes) {
      int n = static_cast<int>(std::min<int64_t>(kLanes, last - j));
      Vec product = some(row + j, n) * scale;
      if constexpr (kScaled<KV>) product = product * some(key_scale + j, n);
      put(row + j, product, n);
      if (n == kLanes) {
        top = max(top, product);
      } else {
        for (int64_t i = j; i < last; ++i) most = std::max(most, row[i]);
      }
    }
    most = std::max(most, largest(top));
    if (most != split.most[r]) {
      float keep = std::exp(split.most[r] - most);
      split.total[r] *= keep;
      for (int64_t d = 0; d < dim; ++d) split.out[r * dim + d] *= keep;
      split.most[r] = most;
    }
    std::fill(row, row + first, 0.0f);
    Vec base = splat(most), added = zero();
    for (int64_t j = first; j < last; j += kLanes) {
      int n = static_cast<int>(std::min<int64_t>(kLanes, last - j));
      put(row + j, exp(some(row + j, n) - base), n);
      Vec weight = some(row + j, n);
      added = added + weight;
      if constexpr (kScaled<KV>) put(row + j, weight * some(value_scale + j, n), n);
    }
    split.total[r] += sum(added);
    std::fill(row + last, row + kTile, 0.0f);
  }

  // out[r, d …] += Σ_j weight[r, j] · values[j, d …], for tokens `from` to `to` of the sequence, all of one tile. Of
  // `Vecs` vectors the last has n numbers.
  template <int Rows, int Vecs, bool Whole, class Place>
  void add_values(const Place& place, int64_t end_block, int64_t tile, int64_t from, int64_t to, int64_t d,
                  int n) const {
    constexpr int64_t kStep = Vecs * kLanes * static_cast<int64_t>(sizeof(KV));  // bytes of a token
    const int64_t dim = call.head_dim, size = call.block_size;
    Vec acc[Rows][Vecs];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < Vecs; ++v) acc[r][v] = some(split.out + r * dim + d + v * kLanes, v + 1 < Vecs ? kLanes : n);
    for (int64_t block = from / size; block <= (to - 1) / size; ++block) {
      const int64_t at = block * size, begin = std::max(from, at) - at, end = std::min(to, at + size) - at;
      const KV* values = reinterpret_cast<const KV*>(place(call.values, block)) + d;
      // keys of the next tile are read soon, this pass asks for its share of them
      const char* next = place(call.keys, std::min(end_block, block + (kTile + size - 1) / size)) +
                         d * size * static_cast<int64_t>(sizeof(KV));
      for (int64_t j = begin; j < end; ++j) {
        _mm_prefetch(next + j * kStep, _MM_HINT_T1);
        const KV* value = values + j * dim;
        Vec got[Vecs];
#pragma GCC unroll 2
        for (int v = 0; v < Vecs; ++v)
          got[v] = Whole ? load(value + v * kLanes) : load(value + v * kLanes, n);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
          Vec weight = splat(scores[r * kTile + at + j - tile]);
#pragma GCC unroll 2
          for (int v = 0; v < Vecs; ++v) acc[r][v] = fma(weight, got[v], acc[r][v]);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < Vecs; ++v)
        put(split.out + r * dim + d + v * kLanes, acc[r][v], v + 1 < Vecs ? kLanes : n);
  }
};

template <class KV, bool Dot>
void attend(Pool& pool, const Attention& call, const AttentionPlan& plan, float* partials) {
  using Each = Worker<KV, Dot>;
  const int64_t room = Each::size(call.head_dim);
  float* own = partials + plan.partials;
  pool.each(static_cast<int64_t>(plan.pieces.size()),
            [&](int64_t number, int thread) { Each(call, own + thread * room).run(plan.pieces[number], partials); });
  pool.each(static_cast<int64_t>(plan.cut.size()), [&](int64_t number, int thread) {
    Each(call, own + thread * room).merge_splits(plan.cut[number], partials);
  });
}

// A key to slot `at` of its block, a value likewise.
template <class T, class KV>
void keep_row(const T* key, const T* value, int64_t dim, int64_t size, int64_t at, KV* keys, KV* values) {
  constexpr int kWide = kTogether<KV>;
  for (int64_t d = 0; d < dim; d += kLanes) {
    int n = static_cast<int>(std::min<int64_t>(kLanes, dim - d));
    KV turned[kLanes];
    store(turned, load(key + d, n), n);
    for (int i = 0; i < n; ++i) keys[(d + i) / kWide * kWide * size + at * kWide + (d + i) % kWide] = turned[i];
    store(values + at * dim + d, load(value + d, n), n);
  }
}
template <class T>
void keep_row(const T* key, const T* value, int64_t dim, int64_t size, int64_t at, int8_t* keys, int8_t* values) {
  int32_t unused;
  float scale;
  int8_t* codes = values + at * dim;  // for the moment
  round_row(key, dim, dim, 0, dim, codes, &unused, &scale);
  for (int64_t d = 0; d < dim; d += 4) {
    int32_t four = four_codes(codes + d) ^ static_cast<int32_t>(0x80808080);  // + 128
    std::memcpy(keys + d * size + at * 4, &four, 4);
  }
  std::memcpy(keys + dim * size + at * 4, &scale, 4);
  round_row(value, dim, dim, 0, dim, codes, &unused, &scale);
  std::memcpy(values + dim * size + at * 4, &scale, 4);
}

template <class T, class KV>
void keep(const Cache& cache, const T* keys, const T* values, int64_t slot) {
  const int64_t dim = cache.head_dim, size = cache.block_size, block = slot / size;
  for (int64_t head = 0; head < cache.kv_heads; ++head) {
    const int64_t place = (block * cache.kv_heads + head) * block_bytes<KV>(dim, size);
    keep_row(keys + head * dim, values + head * dim, dim, size, slot % size,
             reinterpret_cast<KV*>(static_cast<char*>(cache.keys) + place),
             reinterpret_cast<KV*>(static_cast<char*>(cache.values) + place));
  }
}

}  // namespace

AttentionPlan::AttentionPlan(const Attention& call, int threads) : head_dim(call.head_dim) {
  const int64_t group = call.heads / call.kv_heads;
  int64_t splits = 0;
  for (int64_t s = 0; s < call.sequences; ++s) {
    const int64_t count = call.query_starts[s + 1] - call.query_starts[s], rows = count * group;
    for (int64_t row = 0; row < rows; row += kRows) {
      const int64_t some = std::min<int64_t>(kRows, rows - row), before = call.contexts[s] - count + 1;
      const int64_t low = call.window > 0 ? std::max<int64_t>(0, before + row / group - call.window) : 0;
      const int64_t limit = before + (row + some - 1) / group;
      for (int64_t head = 0; head < call.kv_heads; ++head) {
        pieces.push_back({static_cast<int32_t>(s), static_cast<int32_t>(head), static_cast<int32_t>(row),
                          static_cast<int32_t>(some), static_cast<int32_t>(low / kSplit),
                          static_cast<int32_t>((limit - 1) / kSplit + 1), -1});
        splits += pieces.back().last - pieces.back().first;
      }
    }
  }
  // the longest first, so that nobody is left with one at the end
  auto length = [](const AttentionTask& task) { return task.last - task.first; };
  std::stable_sort(pieces.begin(), pieces.end(),
                   [&](const AttentionTask& a, const AttentionTask& b) { return length(a) > length(b); });
  size_t at = 0;
  for (; at < pieces.size() && threads > 1; ++at) {
    AttentionTask task = pieces[at];
    const int64_t room = length(task) * Softmax::size(task.rows, head_dim);
    if (length(task) == 1 || length(task) * threads * 4 <= splits || partials + room > kPartials) break;
    task.partial = partials;
    partials += room;
    cut.push_back(task);
  }
  if (cut.empty()) return;
  std::vector<AttentionTask> whole(pieces.begin() + static_cast<std::ptrdiff_t>(at), pieces.end());
  pieces.clear();
  for (const AttentionTask& task : cut) {
    for (int32_t number = task.first; number < task.last; ++number) {
      AttentionTask piece = task;
      piece.first = number;
      piece.last = number + 1;
      piece.partial += (number - task.first) * Softmax::size(task.rows, head_dim);
      pieces.push_back(piece);
    }
  }
  pieces.insert(pieces.end(), whole.begin(), whole.end());
}

int64_t AttentionPlan::scratch(int threads) const {
  return (partials + threads * Worker<float, false>::size(head_dim)) * static_cast<int64_t>(sizeof(float));
}

void attention(Pool& pool, const Attention& call, const AttentionPlan& plan, void* scratch) {
  float* room = static_cast<float*>(scratch);
  switch (call.kv_format) {
    case kFloat32: return attend<float, false>(pool, call, plan, room);
    case kBfloat16:
      return kDotPairs && call.format == kBfloat16 ? attend<bf16, kDotPairs>(pool, call, plan, room)
                                                   : attend<bf16, false>(pool, call, plan, room);
    case kFloat16: return attend<fp16, false>(pool, call, plan, room);
    default: return attend<int8_t, false>(pool, call, plan, room);
  }
}

void keep_token(const Cache& cache, Format format, const void* keys, const void* values, int64_t slot) {
  with(format, [&]<class T>(T) {
    auto as = [&]<class KV>(KV) {
      keep<T, KV>(cache, static_cast<const T*>(keys), static_cast<const T*>(values), slot);
    };
    cache.format == kInt8 ? as(int8_t{}) : with(cache.format, as);
  });
}

}  // namespace quire
