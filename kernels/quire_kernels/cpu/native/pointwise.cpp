// What stands between two matrix products: norms, rotation, the gate of an MLP; and what is done to logits. One row is
// one task's smallest piece; short rows are taken several at a time, so that handing them out costs less than they do.
#include "pointwise.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "simd.h"

namespace quire {

namespace {

constexpr int64_t kNumbers = 8192;  // of a piece, about

template <class Each>
void in_pieces(Pool& pool, int64_t rows, int64_t width, Each&& each) {
  int64_t some = std::max<int64_t>(1, kNumbers / std::max<int64_t>(1, width));
  pool.each((rows + some - 1) / some, [&](int64_t piece, int) {
    for (int64_t row = piece * some; row < std::min(rows, (piece + 1) * some); ++row) each(row);
  });
}

template <class Do>
inline void along(int64_t width, Do&& step) {
  int64_t at = 0;
  for (; at + kLanes <= width; at += kLanes) step(at, kLanes);
  if (at < width) step(at, static_cast<int>(width - at));
}

template <class T>
inline Vec some(const T* p, int n) {
  return n == kLanes ? load(p) : load(p, n);
}
template <class T>
inline void put(T* p, Vec a, int n) {
  if (n == kLanes) {
    store(p, a);
  } else {
    store(p, a, n);
  }
}

template <class T, class W>
void norm_row(const T* x, const W* weight, int64_t width, float eps, T* out) {
  Vec squares = zero();
  along(width, [&](int64_t at, int n) {
    Vec v = some(x + at, n);
    squares = fma(v, v, squares);
  });
  Vec scale = splat(1.0f / std::sqrt(sum(squares) / static_cast<float>(width) + eps));
  along(width, [&](int64_t at, int n) { put(out + at, some(x + at, n) * scale * some(weight + at, n), n); });
}

// Pairs (x[d], x[d + width / 2]); `to` may be `x`.
template <class T>
void turn_row(const T* x, const float* cos, const float* sin, int64_t width, T* to) {
  const int64_t half = width / 2;
  along(half, [&](int64_t at, int n) {
    Vec a = some(x + at, n), b = some(x + half + at, n);
    put(to + at, fma(a, some(cos + at, n), b * some(sin + at, n)), n);
    put(to + half + at, fma(b, some(cos + half + at, n), a * some(sin + half + at, n)), n);
  });
}

// A head's numbers, normed if there is a weight, and rotated.
template <class T, class W>
void place_head(const T* x, const W* norm, float eps, const float* cos, const float* sin, int64_t width, T* to) {
  if (norm) norm_row(x, norm, width, eps, to);
  turn_row(norm ? to : x, cos, sin, width, to);
}

// Calls act(a number of the format).
template <class Act>
void with(Format format, Act&& act) {
  format == kFloat32 ? act(float{}) : format == kBfloat16 ? act(bf16{}) : act(fp16{});
}

// Calls act(a number of the format, one of the weight's): that is another format only if it is float32.
template <class Act>
void with(Format format, Format weight_format, Act&& act) {
  with(format, [&]<class T>(T number) { weight_format == kFloat32 ? act(number, float{}) : act(number, number); });
}

// through(gate) · up.
template <class Through>
void gated(Pool& pool, const Gate& call, Through&& through) {
  with(call.format, [&]<class T>(T) {
    in_pieces(pool, call.rows, call.width, [&](int64_t row) {
      const T *gate = static_cast<const T*>(call.gate_up) + row * call.stride, *up = gate + call.width;
      T* to = static_cast<T*>(call.out) + row * call.width;
      along(call.width, [&](int64_t at, int n) { put(to + at, through(some(gate + at, n)) * some(up + at, n), n); });
    });
  });
}

}  // namespace

void rms_norm(Pool& pool, const RmsNorm& call) {
  with(call.format, call.weight_format, [&]<class T, class W>(T, W) {
    in_pieces(pool, call.rows, call.width, [&](int64_t row) {
      norm_row(static_cast<const T*>(call.x) + row * call.stride, static_cast<const W*>(call.weight), call.width,
               static_cast<float>(call.eps), static_cast<T*>(call.out) + row * call.width);
    });
  });
}

void add_rms_norm(Pool& pool, const AddRmsNorm& call) {
  with(call.format, call.weight_format, [&]<class T, class W>(T, W) {
    in_pieces(pool, call.rows, call.width, [&](int64_t row) {
      const T* from = static_cast<const T*>(call.x) + row * call.stride;
      T* to = static_cast<T*>(call.residual) + row * call.residual_stride;
      along(call.width, [&](int64_t at, int n) { put(to + at, some(from + at, n) + some(to + at, n), n); });
      norm_row(to, static_cast<const W*>(call.weight), call.width, static_cast<float>(call.eps),
               static_cast<T*>(call.out) + row * call.width);
    });
  });
}

void turns(Pool& pool, const Turns& call) {
  const int64_t half = call.width / 2;
  const float factor = static_cast<float>(call.factor);
  in_pieces(pool, call.rows, 64 * call.width, [&](int64_t row) {  // a number takes as long as many elsewhere
    float *cos = call.cos + row * call.width, *sin = call.sin + row * call.width;
    for (int64_t d = 0; d < half; ++d) {
      const float angle = static_cast<float>(call.positions[row]) * call.frequencies[d];
      cos[d] = cos[d + half] = std::cos(angle) * factor;
      sin[d + half] = std::sin(angle) * factor;
      sin[d] = -sin[d + half];
    }
  });
}

int64_t place_heads_scratch(int threads, const PlaceHeads& call) {
  return threads * call.cache.kv_heads * call.cache.head_dim * static_cast<int64_t>(sizeof(float));
}

void place_heads(Pool& pool, const PlaceHeads& call, void* scratch) {
  const int64_t dim = call.cache.head_dim, kv_heads = call.cache.kv_heads, heads = call.heads;
  const float eps = static_cast<float>(call.eps);
  with(call.format, call.norm_format, [&]<class T, class W>(T, W) {
    const W *query_norm = static_cast<const W*>(call.query_norm), *key_norm = static_cast<const W*>(call.key_norm);
    pool.each(call.rows, [&](int64_t row, int thread) {
      const T* from = static_cast<const T*>(call.qkv) + row * call.stride;
      const float *cos = call.cos + row * dim, *sin = call.sin + row * dim;
      T* to = static_cast<T*>(call.out) + row * heads * dim;
      T* keys = static_cast<T*>(scratch) + thread * kv_heads * dim;
      for (int64_t h = 0; h < heads; ++h)
        place_head(from + h * dim, query_norm, eps, cos, sin, dim, to + h * dim);
      for (int64_t h = 0; h < kv_heads; ++h)
        place_head(from + (heads + h) * dim, key_norm, eps, cos, sin, dim, keys + h * dim);
      keep_token(call.cache, call.format, keys, from + (heads + kv_heads) * dim, call.slots[row]);
    });
  });
}

void silu_mul(Pool& pool, const Gate& call) {
  gated(pool, call, [](Vec g) { return g / (splat(1.0f) + exp(zero() - g)); });
}

void gelu_mul(Pool& pool, const Gate& call) {
  // (1 + tanh(u)) / 2 is 1 / (1 + e^-2u)
  const Vec first = splat(-1.5957691216057308f), third = splat(-0.07135481627260025f);  // -√(8 / π), times 0.044715
  gated(pool, call, [&](Vec g) { return g / (splat(1.0f) + exp(g * fma(g * g, third, first))); });
}

void multiply(Pool& pool, const Multiply& call) {
  const Vec factor = splat(static_cast<float>(call.factor));
  with(call.format, [&]<class T>(T) {
    in_pieces(pool, call.rows, call.width, [&](int64_t row) {
      T* x = static_cast<T*>(call.x) + row * call.stride;
      along(call.width, [&](int64_t at, int n) { put(x + at, some(x + at, n) * factor, n); });
    });
  });
}

void take(Pool& pool, const Take& call) {
  in_pieces(pool, call.rows, call.width, [&](int64_t row) {
    std::memcpy(static_cast<char*>(call.out) + row * call.width,
                static_cast<const char*>(call.x) + call.ids[row] * call.stride, static_cast<size_t>(call.width));
  });
}

namespace {
constexpr int64_t kPart = 1 << 15;  // numbers of a row that are a piece
}

int64_t largest_scratch(const Largest& call) {
  return call.rows * ((call.width + kPart - 1) / kPart) * static_cast<int64_t>(sizeof(Peak));
}

Peak peak(const float* row, int64_t begin, int64_t end) {
  // the largest first, in eight independent runs; then where it is
  Vec most[8];
  int wrong = 0;
  for (auto& v : most) v = splat(-INFINITY);
  int64_t at = begin;
  for (; at + 8 * kLanes <= end; at += 8 * kLanes) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      Vec v = load(row + at + i * kLanes);
      most[i] = max(most[i], v);
      wrong |= not_numbers(v);
    }
  }
  for (int i = 1; i < 8; ++i) most[0] = max(most[0], most[i]);
  float value = largest(most[0]);
  for (; at < end; ++at) {
    value = std::max(value, row[at]);
    wrong |= std::isnan(row[at]);
  }
  if (wrong) return {NAN, begin};
  int64_t place = begin;
  while (row[place] != value) ++place;
  return {value, place};
}

void largest(Pool& pool, const Largest& call, void* scratch) {
  const int64_t width = call.width, parts = (width + kPart - 1) / kPart;
  Peak* found = static_cast<Peak*>(scratch);
  pool.each(call.rows * parts, [&](int64_t piece, int) {
    const int64_t begin = piece % parts * kPart;
    found[piece] = peak(call.logits + piece / parts * call.stride, begin, std::min(width, begin + kPart));
  });
  for (int64_t row = 0; row < call.rows; ++row) {
    Peak best = found[row * parts];
    for (int64_t part = 1; part < parts; ++part) {
      const Peak& other = found[row * parts + part];
      if (std::isnan(other.value) || other.value > best.value) best = other;
      if (std::isnan(best.value)) break;
    }
    call.values[row] = best.value;
    call.places[row] = best.place;
  }
}

void cap_logits(Pool& pool, const CapLogits& call) {
  const int64_t parts = (call.width + kPart - 1) / kPart;
  const Vec cap = splat(static_cast<float>(call.cap)), by = splat(static_cast<float>(1.0 / call.cap));
  pool.each(call.rows * parts, [&](int64_t piece, int) {
    const int64_t begin = piece % parts * kPart;
    float* row = call.logits + piece / parts * call.stride + begin;
    along(std::min(kPart, call.width - begin),
          [&](int64_t at, int n) { put(row + at, cap * tanh(some(row + at, n) * by), n); });
  });
}

void mask_tokens(Pool& pool, const MaskTokens& call) {
  const int64_t width = call.width, parts = (width + kPart - 1) / kPart;
  pool.each(call.rows * parts, [&](int64_t piece, int) {
    float* row = call.logits + call.ids[piece / parts] * call.stride;
    const uint8_t* of = call.bits + piece / parts * call.bits_stride;
    const int64_t begin = piece % parts * kPart, end = std::min(width, begin + kPart);
    for (int64_t at = begin; at < end; at += 8) {
      const uint8_t octet = of[at / 8];
      if (octet == 0xff) continue;
      for (int64_t token = at; token < std::min(end, at + 8); ++token)
        if (!(octet >> (token - at) & 1)) row[token] = -INFINITY;
    }
  });
}

}  // namespace quire
