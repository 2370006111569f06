// Matrix products with a weight that was packed once.
//
//     out[m, n] = Σ_k x[m, k] · weight[n, k] + bias[n]
//
// A weight is cut into panels of 64 outputs, the last of what is left. Within a panel of N outputs the numbers lie in
// the order in which they are used, and nothing is added to them, so a packed weight has the bytes it had:
//
//     float32, float16    [K][N]
//     bfloat16            [K / 2][N][2]     pairs, which is what vdpbf16ps takes; K is even
//
// A panel is a task. It is read from memory once a step and swept by all rows, a few at a time (ahead.h). Their sums stay
// in registers for all of K; so what a number comes out as does not depend on how many rows there are. Where the
// processor has no products of bfloat16 pairs, rows are widened to float32 first.
#include "gemm.h"

#include <algorithm>

#include "ahead.h"
#include "simd.h"

namespace quire {

namespace {

constexpr int kVecs = sizeof(Vec) == 64 ? 4 : 2;  // of a row, held in registers at once
constexpr int kSlice = kVecs * kLanes;            // outputs that are
constexpr int kRows = sizeof(Vec) == 64 ? 6 : 5;

// How many of each vector's lanes a slice of `left` outputs has.
struct Lanes {
  int n[kVecs];
  explicit Lanes(int64_t left) {
    for (int v = 0; v < kVecs; ++v)
      n[v] = static_cast<int>(std::clamp<int64_t>(left - v * kLanes, 0, kLanes));
  }
};

// Sums of `Rows` rows over all of K, for one slice of a panel of `outputs`.
template <int Rows, bool Whole, class Weight>
inline void sums(const float* x, int64_t stride, const Weight* slice, int64_t outputs, int64_t width,
                 const Lanes& lanes, Ahead ahead, Vec (&acc)[Rows][kVecs]) {
  for (int64_t k = 0; k < width; ++k) {
    ahead.operator()<kSlice * sizeof(Weight) / 64>(slice + k * outputs);
    Vec w[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      const Weight* at = slice + k * outputs + v * kLanes;
      w[v] = Whole ? load(at) : load(at, lanes.n[v]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      Vec a = splat(x[r * stride + k]);
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) acc[r][v] = fma(a, w[v], acc[r][v]);
    }
  }
}

#if defined(__AVX512BF16__)
constexpr bool kPairs = true;

template <int Rows, bool Whole>
inline void sums(const bf16* x, int64_t stride, const bf16* slice, int64_t outputs, int64_t width, const Lanes& lanes,
                 Ahead ahead, Vec (&acc)[Rows][kVecs]) {
  for (int64_t k = 0; k < width; k += 2) {
    ahead.operator()<kSlice * 4 / 64>(slice + k * outputs);
    __m512bh w[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      const bf16* at = slice + k * outputs + v * 2 * kLanes;
      w[v] = reinterpret_cast<__m512bh>(Whole ? _mm512_loadu_si512(at)
                                              : _mm512_maskz_loadu_epi32(first(lanes.n[v]), at));
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      int32_t pair;
      std::memcpy(&pair, x + r * stride + k, 4);
      __m512bh a = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) acc[r][v].v = _mm512_dpbf16_ps(acc[r][v].v, a, w[v]);
    }
  }
}

#else
constexpr bool kPairs = false;

template <int Rows, bool Whole>
inline void sums(const float* x, int64_t stride, const bf16* slice, int64_t outputs, int64_t width, const Lanes& lanes,
                 Ahead ahead, Vec (&acc)[Rows][kVecs]) {
  for (int64_t k = 0; k < width; k += 2) {
    ahead.operator()<kSlice * 4 / 64>(slice + k * outputs);
    Pair w[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      const bf16* at = slice + k * outputs + v * 2 * kLanes;
      w[v] = Whole ? load_pair(at) : load_pair(at, lanes.n[v]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      Vec a = splat(x[r * stride + k]), b = splat(x[r * stride + k + 1]);
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) acc[r][v] = fma(b, odd(w[v]), fma(a, even(w[v]), acc[r][v]));
    }
  }
}

#endif

template <class X, class Weight>
struct Product {
  const X* x;
  int64_t stride, rows, width;
  const Weight* weight;
  int64_t outputs;
  const Weight* bias;

  static constexpr int64_t kTogether = std::is_same_v<Weight, bf16> ? 2 : 1;  // numbers of an output that lie together

  template <int Rows, bool Whole, class Out>
  void block(int64_t row, int64_t output, const Weight* slice, int64_t in_panel, const Lanes& lanes,
             const Ahead& ahead, Out* out, int64_t out_stride) const {
    Vec acc[Rows][kVecs];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) acc[r][v] = zero();
    sums<Rows, Whole>(x + row * stride, stride, slice, in_panel, width, lanes, ahead, acc);
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      if (lanes.n[v] == 0) break;
      int64_t at = output + v * kLanes;
      Vec b = bias ? load(bias + at, lanes.n[v]) : zero();
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        Out* to = out + (row + r) * out_stride + at;
        Whole ? store(to, acc[r][v] + b) : store(to, acc[r][v] + b, lanes.n[v]);
      }
    }
  }

  template <bool Whole, class Out>
  void slice(int64_t output, const Weight* from, const Weight* next, int64_t in_panel, const Lanes& lanes, Out* out,
             int64_t out_stride) const {
    const int64_t step = in_panel * static_cast<int64_t>(sizeof(Weight)) * kTogether;
    const Passes passes(rows, kRows);
    int64_t row = 0;
    for (int64_t pass = 0; pass < passes.count; ++pass) {
      const Ahead ahead(from, width / kTogether * step, next, step, pass, passes.count);
      switch (passes.rows(pass)) {
        case 6: block<std::min(6, kRows), Whole>(row, output, from, in_panel, lanes, ahead, out, out_stride); break;
        case 5: block<5, Whole>(row, output, from, in_panel, lanes, ahead, out, out_stride); break;
        case 4: block<4, Whole>(row, output, from, in_panel, lanes, ahead, out, out_stride); break;
        case 3: block<3, Whole>(row, output, from, in_panel, lanes, ahead, out, out_stride); break;
        case 2: block<2, Whole>(row, output, from, in_panel, lanes, ahead, out, out_stride); break;
        case 1: block<1, Whole>(row, output, from, in_panel, lanes, ahead, out, out_stride); break;
      }
      row += passes.rows(pass);
    }
  }

  // `apart`: panels from one that a thread takes to the next, as a rule.
  template <class Out>
  void panel(int64_t number, int64_t apart, Out* out, int64_t out_stride) const {
    const int64_t begin = number * kPanel, in_panel = std::min(kPanel, outputs - begin);
    const bool more = begin + (apart + 1) * kPanel <= outputs;
    for (int64_t at = 0; at < in_panel; at += kSlice) {
      const Weight* from = weight + begin * width + at * kTogether;
      const Weight* next = more ? from + apart * kPanel * width : nullptr;
      Lanes lanes(in_panel - at);
      if (in_panel - at >= kSlice) {
        slice<true>(begin + at, from, next, in_panel, lanes, out, out_stride);
      } else {
        slice<false>(begin + at, from, next, in_panel, lanes, out, out_stride);
      }
    }
  }
};

template <class X, class Weight>
void multiply(const Linear& call, int64_t number, int64_t apart) {
  const Product<X, Weight> product{static_cast<const X*>(call.x),
                                   call.stride,
                                   call.rows,
                                   call.width,
                                   static_cast<const Weight*>(call.weight),
                                   call.outputs,
                                   static_cast<const Weight*>(call.bias)};
  switch (call.out_format) {
    case kFloat32: return product.panel(number, apart, static_cast<float*>(call.out), call.out_stride);
    case kBfloat16: return product.panel(number, apart, static_cast<bf16*>(call.out), call.out_stride);
    case kFloat16: return product.panel(number, apart, static_cast<fp16*>(call.out), call.out_stride);
  }
}

template <class T>
void widen_row(const T* from, int64_t width, float* to) {
  int64_t k = 0;
  for (; k + kLanes <= width; k += kLanes) store(to + k, load(from + k));
  if (k < width) {
    int n = static_cast<int>(width - k);
    store(to + k, load(from + k, n), n);
  }
}

bool widens(Format format) { return format == kFloat16 || (format == kBfloat16 && !kPairs); }

// Where number `k` of output `column` lies in a panel of `outputs`.
inline int64_t place(bool pairs, int64_t outputs, int64_t column, int64_t k) {
  return pairs ? (k / 2 * outputs + column) * 2 + k % 2 : k * outputs + column;
}

// The rows of a panel lie together before and after, so a panel is made beside them and put in their place.
template <class T>
void pack_as(Pool& pool, bool pairs, T* weight, int64_t outputs, int64_t width, T* scratch) {
  pool.each(panels(outputs), [&](int64_t number, int thread) {
    const int64_t begin = number * kPanel, in_panel = std::min(kPanel, outputs - begin);
    T* rows = weight + begin * width;
    T* panel = scratch + thread * kPanel * width;
    for (int64_t n = 0; n < in_panel; ++n)
      for (int64_t k = 0; k < width; ++k) panel[place(pairs, in_panel, n, k)] = rows[n * width + k];
    std::memcpy(rows, panel, in_panel * width * sizeof(T));
  });
}

template <class T>
void unpack_as(Pool& pool, bool pairs, const UnpackRows& call) {
  const int64_t width = call.width;
  pool.each(call.rows, [&](int64_t number, int) {
    const int64_t id = call.ids[number], begin = id / kPanel * kPanel, in_panel = std::min(kPanel, call.outputs - begin);
    const T* panel = static_cast<const T*>(call.weight) + begin * width;
    T* to = static_cast<T*>(call.out) + number * width;
    for (int64_t k = 0; k < width; ++k) to[k] = panel[place(pairs, in_panel, id - begin, k)];
  });
}

}  // namespace

int64_t pack_scratch(int threads, Format format, int64_t width) {
  return threads * kPanel * width * (format == kFloat32 ? 4 : 2);
}

void pack(Pool& pool, Format format, void* weight, int64_t outputs, int64_t width, void* scratch) {
  if (format == kFloat32) {
    pack_as(pool, false, static_cast<float*>(weight), outputs, width, static_cast<float*>(scratch));
  } else {
    pack_as(pool, format == kBfloat16, static_cast<uint16_t*>(weight), outputs, width,
            static_cast<uint16_t*>(scratch));
  }
}

void unpack_rows(Pool& pool, const UnpackRows& call) {
  call.format == kFloat32 ? unpack_as<float>(pool, false, call) : unpack_as<uint16_t>(pool, call.format == kBfloat16, call);
}

int64_t made_row_bytes(Format format, int64_t width) { return width * (format == kBfloat16 && kPairs ? 2 : 4); }

void make_row(Format format, const void* from, int64_t width, void* to) {
  if (!widens(format)) {
    std::memcpy(to, from, made_row_bytes(format, width));
  } else if (format == kBfloat16) {
    widen_row(static_cast<const bf16*>(from), width, static_cast<float*>(to));
  } else {
    widen_row(static_cast<const fp16*>(from), width, static_cast<float*>(to));
  }
}

void linear_panel(const Linear& call, int64_t number, int64_t apart) {
  switch (call.format) {
    case kFloat32: return multiply<float, float>(call, number, apart);
    case kFloat16: return multiply<float, fp16>(call, number, apart);
    case kBfloat16: return multiply<std::conditional_t<kPairs, bf16, float>, bf16>(call, number, apart);
  }
}

int64_t linear_scratch(Format format, int64_t rows, int64_t width) {
  return widens(format) ? rows * made_row_bytes(format, width) : 0;
}

void linear(Pool& pool, const Linear& call, void* scratch) {
  Linear made = call;
  if (widens(call.format)) {
    pool.each(call.rows, [&](int64_t row, int) {
      make_row(call.format, static_cast<const uint16_t*>(call.x) + row * call.stride, call.width,
               static_cast<float*>(scratch) + row * call.width);
    });
    made.x = scratch;
    made.stride = call.width;
  }
  pool.each(panels(call.outputs), [&](int64_t number, int) { linear_panel(made, number, pool.size()); });
}

}  // namespace quire
