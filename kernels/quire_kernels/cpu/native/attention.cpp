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
// A soft cap has a pass of its own over the products of a tile, before what is hidden is. A sink joins what a softmax divides
// by once, when all splits are merged.
//
// Every kSplit keys, counted from the first of the sequence, softmax begins anew, and what the splits give is merged in
// order. A long sequence is so shared among threads without a change of any number: whoever computes a split, and whether
// it is kept for a while or merged at once, the same is done with the same. Rows do not mix. What comes out for a token
// depends on its own sequence alone.
//
// While a tile is computed, the next one is asked for, that of the thread's next task at the end of one. A task takes some
// key heads together, one after the other in each tile, so that memory is read in the order in which it lies: a run of the
// blocks of one head among others' is a page at best, and memory is slower where runs are short.
#include "attention.h"

#include <algorithm>
#include <cmath>

#include "round.h"
#include "simd.h"

namespace quire {

namespace {

constexpr int kRows = 8;
constexpr int64_t kTile = 128;
constexpr int64_t kSplit = 8 * kTile;
constexpr int64_t kTileBytes = 1 << 17;  // keys and values of a tile at most, of the heads of a task, if it has several
constexpr int64_t kPartials = 1 << 22;   // floats that wait to be merged at most
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

// Softmax over some keys: its maximum, the sum of its weights, and Σ weight · value [dim]. Weights are powers of two, so
// the maximum is in such units, too.
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
  const int count = static_cast<int>(rows);
  const Vec ours = load(all.most, count), theirs = load(more.most, count), most = max(ours, theirs);
  float top[kLanes], keep[kLanes], add[kLanes];
  store(top, most);
  store(keep, exp2(ours - most));
  store(add, exp2(theirs - most));
  for (int64_t r = 0; r < rows; ++r) {
    if (more.total[r] == 0.0f) continue;  // a row that sees no key of the split
    for (int64_t d = 0; d < dim; d += kLanes) {
      int n = static_cast<int>(std::min<int64_t>(kLanes, dim - d));
      float* to = all.out + r * dim + d;
      put(to, fma(some(more.out + r * dim + d, n), splat(add[r]), some(to, n) * splat(keep[r])), n);
    }
    Vec total = fma(splat(more.total[r]), splat(add[r]), splat(all.total[r]) * splat(keep[r]));
    store(&all.total[r], total, 1);
    all.most[r] = top[r];
  }
}

// Of scores [rows, kTile] in powers of two, in places `begin` to `end`. Not inlined, as it is never where most time goes.
[[gnu::noinline]] void cap(float* scores, int64_t rows, int64_t begin, int64_t end, float softcap) {
  const float most = softcap * 1.44269504f;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = begin; j < end; j += kLanes) {
      float* at = scores + r * kTile + j;
      store(at, tanh(load(at) * splat(1.0f / most)) * splat(most));
    }
}

template <class Do>
void with(Format format, Do&& act) {
  format == kFloat32 ? act(float{}) : format == kBfloat16 ? act(bf16{}) : act(fp16{});
}

// What a task sees: tokens `from` to `to` of its sequence. Those of its rows overlap.
struct Span {
  int64_t from, to;

  static Span of(const Attention& call, const AttentionTask& task, int64_t row) {
    const int64_t count = call.query_starts[task.sequence + 1] - call.query_starts[task.sequence];
    const int64_t limit = call.contexts[task.sequence] - count + (task.first_row + row) / (call.heads / call.kv_heads) + 1;
    return {call.window > 0 ? std::max<int64_t>(0, limit - call.window) : 0, limit};
  }
  static Span of(const Attention& call, const AttentionTask& task) {
    return {std::max(of(call, task, 0).from, task.first * kSplit),
            std::min(of(call, task, task.rows - 1).to, task.last * kSplit)};
  }
};

// The blocks of a tile, one behind the other: keys, or values, of a head.
class Walk {
 public:
  Walk(const Attention& call, const void* side, int64_t bytes, const AttentionTask& task, int32_t head, int64_t from)
      : side_(static_cast<const char*>(side) + (task.kv_head + head) * bytes), all_heads_(call.kv_heads * bytes),
        at_(call.block_tables + task.sequence * call.table_width + from / call.block_size) {}

  const char* next() { return side_ + *at_++ * all_heads_; }

 private:
  const char* side_;
  int64_t all_heads_;
  const int32_t* at_;
};

// Asks memory for the keys and then the values of `part`, a tile or nothing, for all heads of a task, in the order in which
// they lie, during `steps` steps of some other work: evenly, for memory that stands idle for a part of them is not faster
// during the rest.
class Ahead {
 public:
  Ahead(const Attention& call, int64_t bytes, const AttentionTask& task, const Span& part, int64_t steps)
      : place{static_cast<const char*>(call.query), static_cast<const char*>(call.query) + 64},
        keys_(call, call.keys, bytes, task, 0, part.from), values_(call, call.values, bytes, task, 0, part.from),
        run_(task.kv_heads * bytes),
        blocks_(part.from < part.to ? (part.to - 1) / call.block_size - part.from / call.block_size + 1 : 0),
        left_(2 * blocks_), each_(std::min<int64_t>(64, left_ * run_ / steps + 1)) {
    turn();
  }

  // Where it is, in registers of who works.
  struct Place {
    const char *at, *end;
  };
  Place place;

  template <int Steps>
  [[gnu::always_inline]] void ask(Place& now) {
#pragma GCC unroll 2
    for (int step = 0; step < Steps; ++step) _mm_prefetch(now.at + step * each_, _MM_HINT_T1);
    now.at += Steps * each_;
    if (now.at >= now.end) [[unlikely]] {
      turn();
      now = place;
    }
  }

 private:
  // To the next block; at the end it stays at what is there already.
  [[gnu::noinline]] void turn() {
    if (left_ == 0) {
      place.at = place.end - 64;
      return;
    }
    place.at = left_ > blocks_ ? keys_.next() : values_.next();
    place.end = place.at + run_;
    --left_;
  }

  Walk keys_, values_;
  int64_t run_, blocks_, left_, each_;
};

// A row is a token of the step and one of the query heads of a key head. `Dot`: queries stay in bfloat16 and meet keys in
// vdpbf16ps.
template <class KV, bool Dot>
struct Worker {
  static constexpr int kWide = kTogether<KV>;
  static constexpr bool kCommon = kScaled<KV> || (std::is_same_v<KV, bf16> && Dot == kDotPairs);  // worth code for all

  // Of each key head of a task.
  struct Head {
    Softmax split, all;   // kRows
    float* wide;          // [head_dim, kRows]: queries as float32
    int32_t* packed;      // the same place, [head_dim / kWide, kRows]: two in bfloat16, or four in 8 bits
    float* factor;        // [kRows], of what products give
    int32_t* start;       // [kRows], where they begin
  };

  const Attention& call;
  float* scores;        // [kRows, kTile]
  float* key_scale;     // [kTile]
  float* value_scale;   // [kTile]
  float* room;          // of heads
  Span seen[kRows];

  static int64_t head_size(int64_t dim) { return 2 * Softmax::size(kRows, dim) + kRows * dim + 2 * kRows; }
  static int64_t size(int64_t dim, int64_t heads) { return kRows * kTile + 2 * kTile + heads * head_size(dim); }

  Worker(const Attention& call, float* room) : call(call), scores(room) {
    key_scale = scores + kRows * kTile;
    value_scale = key_scale + kTile;
    this->room = value_scale + kTile;
  }

  Head head(int64_t number) const {
    const int64_t softmax = Softmax::size(kRows, call.head_dim);
    float *at = room + number * head_size(call.head_dim), *factor = at + 2 * softmax, *wide = factor + 2 * kRows;
    return {Softmax::at(at, kRows), Softmax::at(at + softmax, kRows), wide, reinterpret_cast<int32_t*>(wide), factor,
            reinterpret_cast<int32_t*>(factor + kRows)};
  }

  // `soon`: what this thread probably does next, or null.
  void run(const AttentionTask& task, const AttentionTask* soon, float* partials) {
    if constexpr (kCommon) {
      switch (task.rows) {
        case 1: return rows<1>(task, soon, partials);
        case 2: return rows<2>(task, soon, partials);
        case 3: return rows<3>(task, soon, partials);
        case 4: return rows<4>(task, soon, partials);
        case 5: return rows<5>(task, soon, partials);
        case 6: return rows<6>(task, soon, partials);
        case 7: return rows<7>(task, soon, partials);
      }
    }
    rows<kRows>(task, soon, partials);
  }

  // What is computed is `Rows` of them, those that are too many for nothing.
  template <int Rows>
  void rows(const AttentionTask& task, const AttentionTask* soon, float* partials) {
    const int64_t dim = call.head_dim, bytes = block_bytes<KV>(dim, call.block_size);
    for (int r = 0; r < Rows; ++r) seen[r] = Span::of(call, task, std::min(r, task.rows - 1));
    for (int h = 0; h < task.kv_heads; ++h) {
      take_queries(task, h);
      head(h).all.clear(task.rows, dim);
    }
    const Span span = Span::of(call, task);
    for (int64_t number = task.first; number < task.last; ++number) {
      for (int h = 0; h < task.kv_heads; ++h) head(h).split.clear(Rows, dim);
      const int64_t last = std::min(span.to, (number + 1) * kSplit);
      for (int64_t tile = std::max(span.from, number * kSplit) / kTile * kTile; tile < last; tile += kTile) {
        // what lies in slots without a token, or before what is seen, may not be a number
        const Span part{std::max(span.from, tile), std::min(last, tile + kTile)};
        const bool more = tile + kTile < span.to;
        const AttentionTask& then = more || !soon ? task : *soon;
        Span ahead = more ? Span{tile + kTile, span.to} : soon ? Span::of(call, then) : Span{0, 0};
        ahead.to = std::min(ahead.to, (ahead.from / kTile + 1) * kTile);
        Ahead next(call, bytes, then, ahead, task.kv_heads * steps<Rows>(tile, part));
        for (int h = 0; h < task.kv_heads; ++h) {
          float keep[kLanes];
          const Walk keys(call, call.keys, bytes, task, h, part.from), values(call, call.values, bytes, task, h, part.from);
          products<Rows>(head(h), keys, next, tile, part);
          if constexpr (kScaled<KV>) scale_keys<Rows>(keys, values, tile, part);
          if (call.softcap > 0.0f)
            cap(scores, Rows, vectors(part.from - tile).from, vectors(part.to - tile).to, call.softcap);
          soften<Rows>(head(h), next, tile, part, keep);
          int64_t d = 0;
          for (; d + kVecs * kLanes <= dim; d += kVecs * kLanes)
            add_values<Rows, kVecs, true>(head(h), values, next, keep, tile, part, d, kLanes);
          for (; d < dim; d += kLanes)
            add_values<Rows, 1, false>(head(h), values, next, keep, tile, part, d,
                                       static_cast<int>(std::min<int64_t>(kLanes, dim - d)));
        }
      }
      for (int h = 0; h < task.kv_heads; ++h) {
        const Softmax split = head(h).split;
        if (task.partial >= 0) {
          const Softmax kept = Softmax::at(partials + task.partial + h * Softmax::size(task.rows, dim), task.rows);
          std::copy_n(split.most, task.rows, kept.most);
          std::copy_n(split.total, task.rows, kept.total);
          std::copy_n(split.out, task.rows * dim, kept.out);
        } else {
          merge(head(h).all, split, task.rows, dim);
        }
      }
    }
    if (task.partial >= 0) return;
    for (int h = 0; h < task.kv_heads; ++h) finish(task, h);
  }

  template <class P>
  P* row_at(P* tensor, int64_t stride, const AttentionTask& task, int h, int r) const {
    const int64_t group = call.heads / call.kv_heads, number = task.first_row + r;
    return tensor + (call.query_starts[task.sequence] + number / group) * stride +
           ((task.kv_head + h) * group + number % group) * call.head_dim;
  }

  // To what each softmax divides by. A sink that is more than 2^127 times the largest weight is as good as all of it.
  [[gnu::noinline]] void add_sinks(const Softmax& all, const AttentionTask& task, int h) const {
    const int64_t group = call.heads / call.kv_heads;
    const float* sinks = call.sinks + (task.kv_head + h) * group;
    float sink[kLanes] = {};
    for (int r = 0; r < task.rows; ++r) sink[r] = sinks[(task.first_row + r) % group] * 1.44269504f;
    const Vec share = exp2(min(splat(127.0f), load(sink) - load(all.most, task.rows)));
    store(all.total, load(all.total, task.rows) + share, task.rows);
  }

  // What is in `all` of a head to where it belongs.
  void finish(const AttentionTask& task, int h) const {
    const int64_t dim = call.head_dim;
    const Softmax all = head(h).all;
    if (call.sinks) add_sinks(all, task, h);
    with(call.format, [&]<class T>(T) {
      for (int r = 0; r < task.rows; ++r) {
        T* to = row_at(static_cast<T*>(call.out), call.out_stride, task, h, r);
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
    for (int h = 0; h < task.kv_heads; ++h) {
      head(h).all.clear(task.rows, dim);
      for (int64_t number = 0; number < task.last - task.first; ++number) {
        float* at = partials + task.partial + (number * task.kv_heads + h) * each;
        merge(head(h).all, Softmax::at(at, task.rows), task.rows, dim);
      }
      finish(task, h);
    }
  }

  void take_queries(const AttentionTask& task, int h) {
    const Head to = head(h);
    // numbers that are left over may be so small that each product takes a hundred times as long
    if (task.rows < kRows) {
      std::fill_n(to.wide, call.head_dim * kRows, 0.0f);
      std::fill_n(to.factor, kRows, 0.0f);
      std::fill_n(to.start, kRows, 0);
    }
    with(call.format, [&]<class T>(T) {
      for (int r = 0; r < task.rows; ++r)
        take_query(to, r, row_at(static_cast<const T*>(call.query), call.query_stride, task, h, r));
    });
  }

  template <class T>
  void take_query(const Head& to, int r, const T* at) {
    const int64_t dim = call.head_dim;
    to.factor[r] = call.scale * 1.44269504f;  // e^x = 2^(x / ln 2)
    if constexpr (kScaled<KV>) {
      float scale;
      int8_t* codes = reinterpret_cast<int8_t*>(scores);  // which are not there yet
      round_row(at, dim, dim, 128, dim, codes, to.start + r, &scale);
      to.factor[r] *= scale;
      for (int64_t d = 0; d < dim; d += 4) to.packed[d / 4 * kRows + r] = four_codes(codes + d);
    } else if constexpr (Dot) {
      for (int64_t d = 0; d < dim; d += 2) std::memcpy(to.packed + d / 2 * kRows + r, at + d, 4);
    } else {
      for (int64_t d = 0; d < dim; ++d) to.wide[d * kRows + r] = as_float(at[d]);
    }
  }

  // scores[r, t - tile] = q[r] · keys[t] for tokens t of `part`, and for those that are in a vector with them.
  template <int Rows>
  void products(const Head& head, Walk keys, Ahead& ahead, int64_t tile, const Span& part) const {
    const int64_t size = call.block_size;
    const int64_t whole = sizeof(KV) * kWide;  // bytes of a token that lie together
    if (size % kLanes == 0) {
      // a vector has tokens of one block; there may be two blocks at a time
      const int64_t end = part.to - tile;
      int64_t at = part.from / kLanes * kLanes - tile, j = (tile + at) % size;
      const char *key = keys.next(), *from[kVecs], *near[kVecs];
      auto take = [&](int64_t behind, const char** to) {
        for (int v = 0; v < kVecs && behind + v * kLanes < end; ++v, j += kLanes) {
          if (j == size) {
            j = 0;
            key = keys.next();
          }
          to[v] = key + j * whole;
        }
      };
      take(at, near);
      for (; at < end; at += kVecs * kLanes) {
        std::copy_n(near, kVecs, from);
        take(at + kVecs * kLanes, near);
        at + (kVecs - 1) * kLanes < end ? some_products<Rows, kVecs, true>(head, from, near, kLanes, at, ahead)
                                        : some_products<Rows, 1, true>(head, from, near, kLanes, at, ahead);
      }
      return;
    }
    for (int64_t block = part.from / size; block <= (part.to - 1) / size; ++block) {
      // a block may begin before the tile or end behind it
      const int64_t at = block * size - tile, end = std::min(size, kTile - at);
      const char* key = keys.next();
      for (int64_t j = std::max<int64_t>(0, -at); j < end; j += kLanes) {
        const char* from[] = {key + j * whole};
        int n = static_cast<int>(std::min<int64_t>(kLanes, end - j));
        n == kLanes ? some_products<Rows, 1, true>(head, from, from, n, at + j, ahead)
                    : some_products<kRows, 1, false>(head, from, from, n, at + j, ahead);
      }
    }
  }

  // How often `Ahead` is called for a head of a tile.
  template <int Rows>
  int64_t steps(int64_t tile, const Span& part) const {
    const int64_t dim = call.head_dim, wide = kVecs * kLanes;
    const int64_t vecs = (vectors(part.to - tile).to - vectors(part.from - tile).from) / kLanes;
    return vecs * (dim / kWide + Rows) + (part.to - part.from) * (dim / wide + (dim % wide + kLanes - 1) / kLanes);
  }

  // Of `Vecs` vectors of tokens that come one behind the other in the tile. Those of `near` are next.
  template <int Rows, int Vecs, bool Whole>
  void some_products(const Head& head, const char* const* from, const char* const* near, int n, int64_t at,
                     Ahead& ahead) const {
    using Sum = std::conditional_t<kScaled<KV>, Ints, Vec>;
    const int64_t size = call.block_size, dim = call.head_dim;
    Ahead::Place place = ahead.place;
    Sum sums[Rows][Vecs];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < Vecs; ++v) {
        if constexpr (kScaled<KV>) {
          sums[r][v] = splat(head.start[r]);
        } else {
          sums[r][v] = zero();
        }
      }
    }
    for (int64_t d = 0; d < dim; d += kWide) {
      const int64_t offset = d * size * static_cast<int64_t>(sizeof(KV));
      const KV* key[Vecs];
#pragma GCC unroll 2
      for (int v = 0; v < Vecs; ++v) {
        key[v] = reinterpret_cast<const KV*>(from[v] + offset);
        _mm_prefetch(near[v] + offset, _MM_HINT_T0);
      }
      ahead.template ask<Vecs>(place);
      if constexpr (kScaled<KV>) {
        Weights k[Vecs];
#pragma GCC unroll 2
        for (int v = 0; v < Vecs; ++v) k[v] = weights(Whole ? load_ints(key[v]) : load_ints(key[v], n));
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
          const Inputs query = inputs(head.packed[d / 4 * kRows + r]);
#pragma GCC unroll 2
          for (int v = 0; v < Vecs; ++v) sums[r][v] = dot(sums[r][v], k[v], query);
        }
      } else if constexpr (kWide == 2) {
        Pair k[Vecs];
#pragma GCC unroll 2
        for (int v = 0; v < Vecs; ++v) k[v] = Whole ? load_pair(key[v]) : load_pair(key[v], n);
        if constexpr (Dot) {
#pragma GCC unroll 8
          for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
            for (int v = 0; v < Vecs; ++v) sums[r][v] = dot(sums[r][v], k[v], head.packed[d / 2 * kRows + r]);
        } else {
          Vec side[Vecs];
#pragma GCC unroll 2
          for (int v = 0; v < Vecs; ++v) side[v] = even(k[v]);
          add_products<Rows, Vecs>(sums, head.wide + d * kRows, side);
#pragma GCC unroll 2
          for (int v = 0; v < Vecs; ++v) side[v] = odd(k[v]);
          add_products<Rows, Vecs>(sums, head.wide + (d + 1) * kRows, side);
        }
      } else {
        Vec k[Vecs];
#pragma GCC unroll 2
        for (int v = 0; v < Vecs; ++v) k[v] = Whole ? load(key[v]) : load(key[v], n);
        add_products<Rows, Vecs>(sums, head.wide + d * kRows, k);
      }
    }
    ahead.place = place;
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const Vec factor = splat(head.factor[r]);
#pragma GCC unroll 2
      for (int v = 0; v < Vecs; ++v) {
        float* to = scores + r * kTile + at + v * kLanes;
        if constexpr (kScaled<KV>) {
          put(to, to_float(sums[r][v]) * factor, n);
        } else {
          put(to, sums[r][v] * factor, n);
        }
      }
    }
  }

  template <int Rows, int Vecs>
  static void add_products(Vec (&sums)[Rows][Vecs], const float* query, const Vec (&keys)[Vecs]) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const Vec number = splat(query[r]);
#pragma GCC unroll 2
      for (int v = 0; v < Vecs; ++v) sums[r][v] = fma(number, keys[v], sums[r][v]);
    }
  }

  // The scales of a tile to where they lie one behind the other; those of keys to the products.
  template <int Rows>
  void scale_keys(Walk keys, Walk values, int64_t tile, const Span& part) const {
    const int64_t size = call.block_size, numbers = call.head_dim * size;
    for (int64_t block = part.from / size; block <= (part.to - 1) / size; ++block) {
      const int64_t at = block * size - tile, j = std::max<int64_t>(0, -at), n = std::min(size, kTile - at) - j;
      std::memcpy(key_scale + at + j, keys.next() + numbers + j * 4, n * 4);
      std::memcpy(value_scale + at + j, values.next() + numbers + j * 4, n * 4);
    }
    for (int64_t j = vectors(part.from - tile).from; j < vectors(part.to - tile).to; j += kLanes) {
      const Vec scale = load(key_scale + j);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) store(scores + r * kTile + j, load(scores + r * kTile + j) * scale);
    }
  }

  // Where the vector that has place `at`, and the one that ends there or behind, begin and end.
  static Span vectors(int64_t at) { return {at / kLanes * kLanes, (at + kLanes - 1) / kLanes * kLanes}; }

  // Products of a tile to weights, those of keys that a row does not see to 0. What was added up before is to be
  // multiplied by `keep`.
  template <int Rows>
  void soften(const Head& head, Ahead& ahead, int64_t tile, const Span& part, float* keep) const {
    Ahead::Place place = ahead.place;
    const int64_t begin = vectors(part.from - tile).from, end = vectors(part.to - tile).to;
    Vec top[Rows];
    for (int r = 0; r < Rows; ++r) {
      float* row = scores + r * kTile;
      std::fill(row + begin, row + std::clamp(seen[r].from - tile, begin, end), -INFINITY);
      std::fill(row + std::clamp(seen[r].to - tile, begin, end), row + end, -INFINITY);
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) top[r] = splat(-INFINITY);
    for (int64_t j = begin; j < end; j += kLanes)
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) top[r] = max(top[r], load(scores + r * kTile + j));
    float most[kLanes] = {}, added[kLanes] = {};
    for (int r = 0; r < Rows; ++r) most[r] = largest(top[r]);
    const Vec before = load(head.split.most, Rows), now = max(before, load(most));
    store(head.split.most, now, Rows);
    // a row that has seen nothing yet takes nothing from nothing
    const Vec base = max(now, splat(-std::numeric_limits<float>::max()));
    store(most, base);
    const Vec share = exp2(before - base);
    store(keep, share);
    for (int r = 0; r < Rows; ++r) {
      float* row = scores + r * kTile;
      const Vec less = splat(most[r]);
      Vec total = zero();
      for (int64_t j = begin; j < end; j += kLanes) {
        ahead.template ask<1>(place);
        Vec weight = exp2(load(row + j) - less);
        total = total + weight;
        if constexpr (kScaled<KV>) weight = weight * load(value_scale + j);
        store(row + j, weight);
      }
      added[r] = sum(total);
    }
    ahead.place = place;
    store(head.split.total, fma(load(head.split.total, Rows), share, load(added)), Rows);
  }

  // out[r, d …] = out[r, d …] · keep[r] + Σ_t weight[r, t] · values[t, d …], for tokens t of `part`. Of `Vecs` vectors the
  // last has n numbers.
  template <int Rows, int Vecs, bool Whole>
  void add_values(const Head& head, Walk walk, Ahead& ahead, const float* keep, int64_t tile, const Span& part,
                  int64_t d, int n) const {
    // two vectors of pairs are widened by one instruction each
    constexpr bool kPairs = std::is_same_v<KV, bf16> && Vecs == 2 && Whole;
    const int64_t dim = call.head_dim, size = call.block_size;
    Ahead::Place place = ahead.place;
    Vec acc[Rows][Vecs];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < Vecs; ++v)
        acc[r][v] =
            some(head.split.out + r * dim + d + v * kLanes, v + 1 < Vecs ? kLanes : n) * splat(keep[r]);
      if constexpr (kPairs) unzip(acc[r][0], acc[r][1]);
    }
    const int64_t last = (part.to - 1) / size;
    const KV* near = reinterpret_cast<const KV*>(walk.next()) + d;
    for (int64_t block = part.from / size; block <= last; ++block) {
      const int64_t at = block * size, begin = std::max(part.from, at) - at, end = std::min(part.to, at + size) - at;
      const KV* values = near;
      if (block < last) near = reinterpret_cast<const KV*>(walk.next()) + d;
      const float* weights = scores + at - tile;
      for (int64_t j = begin; j < end; ++j) {
        ahead.template ask<1>(place);
        _mm_prefetch(near + j * dim, _MM_HINT_T0);
        const KV* value = values + j * dim;
        Vec got[Vecs];
        if constexpr (kPairs) {
          const Pair pair = load_pair(value);
          got[0] = even(pair);
          got[1] = odd(pair);
        } else {
#pragma GCC unroll 2
          for (int v = 0; v < Vecs; ++v) got[v] = Whole ? load(value + v * kLanes) : load(value + v * kLanes, n);
        }
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
          const Vec weight = splat(weights[r * kTile + j]);
#pragma GCC unroll 2
          for (int v = 0; v < Vecs; ++v) acc[r][v] = fma(weight, got[v], acc[r][v]);
        }
      }
    }
    ahead.place = place;
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      if constexpr (kPairs) zip(acc[r][0], acc[r][1]);
#pragma GCC unroll 2
      for (int v = 0; v < Vecs; ++v)
        put(head.split.out + r * dim + d + v * kLanes, acc[r][v], v + 1 < Vecs ? kLanes : n);
    }
  }
};

int64_t up_to_vector(int64_t floats) { return (floats + 15) / 16 * 16; }

template <class KV, bool Dot>
void attend(Pool& pool, const Attention& call, const AttentionPlan& plan, float* partials) {
  using Each = Worker<KV, Dot>;
  const int64_t room = up_to_vector(Each::size(call.head_dim, plan.together));
  float* own = partials + up_to_vector(plan.partials);
  const auto count = static_cast<int64_t>(plan.pieces.size());
  pool.each(count, [&](int64_t number, int thread) {
    const int64_t soon = number + pool.size();
    Each(call, own + thread * room).run(plan.pieces[number], soon < count ? &plan.pieces[soon] : nullptr, partials);
  });
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
    const int64_t rows = (call.query_starts[s + 1] - call.query_starts[s]) * group;
    for (int64_t row = 0; row < rows; row += kRows) {
      AttentionTask task{static_cast<int32_t>(s), 0, static_cast<int32_t>(call.kv_heads), static_cast<int32_t>(row),
                         static_cast<int32_t>(std::min<int64_t>(kRows, rows - row)), 0, 0, -1};
      task.first = static_cast<int32_t>(Span::of(call, task, 0).from / kSplit);
      task.last = static_cast<int32_t>((Span::of(call, task, task.rows - 1).to - 1) / kSplit + 1);
      pieces.push_back(task);
      splits += task.last - task.first;
    }
  }
  // as many heads together as leave work for all, and as a cache holds twice
  const int64_t number_bytes = call.kv_format == kFloat32 ? 4 : call.kv_format == kInt8 ? 1 : 2;
  together = std::min(call.kv_heads, kTileBytes / (2 * kTile * head_dim * number_bytes));
  if (threads > 1) together = std::min(together, splits * call.kv_heads / (4 * threads));
  together = std::max<int64_t>(1, together);
  const int64_t parts = (call.kv_heads + together - 1) / together;
  std::vector<AttentionTask> rows;
  rows.swap(pieces);
  for (const AttentionTask& task : rows) {
    for (int64_t part = 0; part < parts; ++part) {
      AttentionTask piece = task;
      piece.kv_head = static_cast<int32_t>(call.kv_heads * part / parts);
      piece.kv_heads = static_cast<int32_t>(call.kv_heads * (part + 1) / parts) - piece.kv_head;
      pieces.push_back(piece);
    }
  }
  splits *= parts;
  // the longest first, so that nobody is left with one at the end
  auto length = [](const AttentionTask& task) { return task.last - task.first; };
  std::stable_sort(pieces.begin(), pieces.end(),
                   [&](const AttentionTask& a, const AttentionTask& b) { return length(a) > length(b); });
  size_t at = 0;
  for (; at < pieces.size() && threads > 1; ++at) {
    AttentionTask task = pieces[at];
    const int64_t room = length(task) * task.kv_heads * Softmax::size(task.rows, head_dim);
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
      piece.partial += (number - task.first) * task.kv_heads * Softmax::size(task.rows, head_dim);
      pieces.push_back(piece);
    }
  }
  pieces.insert(pieces.end(), whole.begin(), whole.end());
}

int64_t AttentionPlan::scratch(int threads) const {
  return (up_to_vector(partials) + threads * up_to_vector(Worker<float, false>::size(head_dim, together))) *
         static_cast<int64_t>(sizeof(float));
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
