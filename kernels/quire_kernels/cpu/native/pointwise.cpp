// What stands between two matrix products: norms, rotation, the gate of an MLP. One row is one task's smallest piece;
// short rows are taken several at a time, so that handing them out costs less than they do.
#include "pointwise.h"

#include <algorithm>
#include <cmath>

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

template <class T>
void norm_row(const T* x, const T* weight, int64_t width, float eps, T* out) {
  Vec squares = zero();
  along(width, [&](int64_t at, int n) {
    Vec v = some(x + at, n);
    squares = fma(v, v, squares);
  });
  Vec scale = splat(1.0f / std::sqrt(sum(squares) / static_cast<float>(width) + eps));
  along(width, [&](int64_t at, int n) { put(out + at, some(x + at, n) * scale * some(weight + at, n), n); });
}

template <class T>
void norm_rows(Pool& pool, Grid grid, const T* x, int64_t row_stride, int64_t head_stride, const T* weight, float eps,
               T* out) {
  in_pieces(pool, grid.rows * grid.heads, grid.width, [&](int64_t number) {
    const T* from = x + number / grid.heads * row_stride + number % grid.heads * head_stride;
    norm_row(from, weight, grid.width, eps, out + number * grid.width);
  });
}

template <class T>
void add_norm_rows(Pool& pool, int64_t rows, int64_t width, const T* x, int64_t x_stride, T* residual,
                   int64_t residual_stride, const T* weight, float eps, T* out) {
  in_pieces(pool, rows, width, [&](int64_t row) {
    const T* from = x + row * x_stride;
    T* to = residual + row * residual_stride;
    along(width, [&](int64_t at, int n) { put(to + at, some(from + at, n) + some(to + at, n), n); });
    norm_row(to, weight, width, eps, out + row * width);
  });
}

template <class T>
void turn_rows(Pool& pool, Grid grid, const T* x, int64_t row_stride, int64_t head_stride, const float* cos,
               const float* sin, T* out) {
  const int64_t half = grid.width / 2;
  in_pieces(pool, grid.rows * grid.heads, grid.width, [&](int64_t number) {
    int64_t row = number / grid.heads;
    const T* from = x + row * row_stride + number % grid.heads * head_stride;
    const float* c = cos + row * grid.width;
    const float* s = sin + row * grid.width;
    T* to = out + number * grid.width;
    along(half, [&](int64_t at, int n) {
      Vec a = some(from + at, n), b = some(from + half + at, n);
      put(to + at, fma(a, some(c + at, n), b * some(s + at, n)), n);
      put(to + half + at, fma(b, some(c + half + at, n), a * some(s + half + at, n)), n);
    });
  });
}

template <class T>
void gate_rows(Pool& pool, int64_t rows, int64_t width, const T* gate_up, int64_t stride, T* out) {
  in_pieces(pool, rows, width, [&](int64_t row) {
    const T* gate = gate_up + row * stride;
    along(width, [&](int64_t at, int n) {
      Vec g = some(gate + at, n);
      Vec silu = g / (splat(1.0f) + exp(zero() - g));
      put(out + row * width + at, silu * some(gate + width + at, n), n);
    });
  });
}

}  // namespace

void rms_norm(Pool& pool, Format format, Grid grid, const void* x, int64_t row_stride, int64_t head_stride,
              const void* weight, float eps, void* out) {
  auto as = [&]<class T>(T) {
    norm_rows(pool, grid, static_cast<const T*>(x), row_stride, head_stride, static_cast<const T*>(weight), eps,
              static_cast<T*>(out));
  };
  format == kFloat32 ? as(float{}) : format == kBfloat16 ? as(bf16{}) : as(fp16{});
}

void add_rms_norm(Pool& pool, Format format, int64_t rows, int64_t width, const void* x, int64_t x_stride,
                  void* residual, int64_t residual_stride, const void* weight, float eps, void* out) {
  auto as = [&]<class T>(T) {
    add_norm_rows(pool, rows, width, static_cast<const T*>(x), x_stride, static_cast<T*>(residual), residual_stride,
                  static_cast<const T*>(weight), eps, static_cast<T*>(out));
  };
  format == kFloat32 ? as(float{}) : format == kBfloat16 ? as(bf16{}) : as(fp16{});
}

void rotary(Pool& pool, Format format, Grid grid, const void* x, int64_t row_stride, int64_t head_stride,
            const float* cos, const float* sin, void* out) {
  auto as = [&]<class T>(T) {
    turn_rows(pool, grid, static_cast<const T*>(x), row_stride, head_stride, cos, sin, static_cast<T*>(out));
  };
  format == kFloat32 ? as(float{}) : format == kBfloat16 ? as(bf16{}) : as(fp16{});
}

void silu_mul(Pool& pool, Format format, int64_t rows, int64_t width, const void* gate_up, int64_t stride,
              void* out) {
  auto as = [&]<class T>(T) {
    gate_rows(pool, rows, width, static_cast<const T*>(gate_up), stride, static_cast<T*>(out));
  };
  format == kFloat32 ? as(float{}) : format == kBfloat16 ? as(bf16{}) : as(fp16{});
}

namespace {
constexpr int64_t kPart = 1 << 15;  // numbers of a row that are a piece
struct Found {
  float value;
  int64_t place;
};
}  // namespace

int64_t largest_scratch(int64_t rows, int64_t width) {
  return rows * ((width + kPart - 1) / kPart) * static_cast<int64_t>(sizeof(Found));
}

void largest(Pool& pool, const float* logits, int64_t stride, int64_t rows, int64_t width, float* values,
             int64_t* places, void* scratch) {
  const int64_t parts = (width + kPart - 1) / kPart;
  Found* found = static_cast<Found*>(scratch);
  pool.each(rows * parts, [&](int64_t piece, int) {
    const float* row = logits + piece / parts * stride;
    const int64_t begin = piece % parts * kPart, end = std::min(width, begin + kPart);
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
    int64_t place = begin;
    if (wrong) {
      value = NAN;
    } else {
      while (row[place] != value) ++place;
    }
    found[piece] = {value, place};
  });
  for (int64_t row = 0; row < rows; ++row) {
    Found best = found[row * parts];
    for (int64_t part = 1; part < parts; ++part) {
      const Found& other = found[row * parts + part];
      if (std::isnan(other.value) || other.value > best.value) best = other;
      if (std::isnan(best.value)) break;
    }
    values[row] = best.value;
    places[row] = best.place;
  }
}

void mask_tokens(Pool& pool, float* logits, int64_t stride, int64_t width, const int64_t* rows, int64_t count,
                 const uint8_t* bits, int64_t bits_stride) {
  const int64_t parts = (width + kPart - 1) / kPart;
  pool.each(count * parts, [&](int64_t piece, int) {
    float* row = logits + rows[piece / parts] * stride;
    const uint8_t* of = bits + piece / parts * bits_stride;
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
