// Matrix products with a weight in 8 or 4 bits that was packed once.
//
// Panels of 64 outputs, as in gemm.cpp; within a panel of N outputs four inputs of an output lie together, which is
// what vpdpbusd takes. A weight is stored without its sign, by adding 128 or 8 to each number:
//
//     8 bits    [K / 4][N][4]     number + 128, K rounded up to a multiple of 4
//     4 bits    [K / 8][N][4]     number + 8: of eight inputs the first four in the low halves, the others in the high
//
// Rows of x are rounded to 8 bits with a sign first, all by itself a row (round.h).
//
// What was added to the weights is taken off again by the sum of a row's codes: Σ (w + 128) · code - 128 · Σ code. That
// is where sums begin. They are whole numbers and exact, on every level of instructions the same, with or without
// vpdpbusd. In 4 bits they end with the group of inputs that has its scale; what they stand for is added in float32, in
// order.
//
// Where x is not rounded, the weight is widened to float32 in registers. Its bits are taken as they lie, so a weight may
// come out multiplied by a power of two, which its input has been divided by.
#include "quantized.h"

#include <algorithm>

#include "ahead.h"
#include "round.h"
#include "simd.h"

namespace quire {

namespace {

constexpr int kVecs = sizeof(Vec) == 64 ? 4 : 2;
constexpr int kSlice = kVecs * kLanes;
#if defined(__AVX512VNNI__)
constexpr int kRows = 6;
#else
constexpr int kRows = 4;  // weights take twice the registers
#endif
constexpr int kLines = kSlice * 4 / 64;  // of memory, four bytes of each output of a slice

int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

using Rows = MadeRows;

struct Lanes {
  int n[kVecs];
  explicit Lanes(int64_t left) {
    for (int v = 0; v < kVecs; ++v)
      n[v] = static_cast<int>(std::clamp<int64_t>(left - v * kLanes, 0, kLanes));
  }
};

// Four inputs of all outputs of a slice.
template <bool Whole>
inline Ints four_inputs(const uint8_t* at, const Lanes& lanes, int v) {
  return Whole ? load_ints(at + v * 4 * kLanes) : load_ints(at + v * 4 * kLanes, lanes.n[v]);
}

template <int Count>
inline void multiply_add(Ints (&acc)[Count][kVecs], const Weights (&w)[kVecs], const int8_t* codes, int64_t stride) {
#pragma GCC unroll 8
  for (int r = 0; r < Count; ++r) {
    Inputs x = inputs(four_codes(codes + r * stride));
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) acc[r][v] = dot(acc[r][v], w[v], x);
  }
}

// One slice of a panel, for some rows; the results in float32 at `sums` [Count][kSlice], the scale of the row in them.
struct Eight {
  using Scale = float;

  template <int Count, bool Whole>
  [[gnu::noinline]] static void block(const Rows& x, int64_t row, const uint8_t* slice, int64_t outputs,
                                      const Lanes& lanes, const float* scales, Ahead ahead, float* sums) {
    Ints acc[Count][kVecs];
#pragma GCC unroll 8
    for (int r = 0; r < Count; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) acc[r][v] = splat(x.start[row + r]);
    const int8_t* codes = x.codes + row * x.stride;
    for (int64_t k = 0; k < x.width; k += 4) {
      const uint8_t* at = slice + k * outputs;
      ahead.operator()<kLines>(at);
      Weights w[kVecs];
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) w[v] = weights(four_inputs<Whole>(at, lanes, v));
      multiply_add(acc, w, codes + k, x.stride);
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      Vec scale = load(scales + v * kLanes, lanes.n[v]);
#pragma GCC unroll 8
      for (int r = 0; r < Count; ++r)
        store(sums + r * kSlice + v * kLanes, to_float(acc[r][v]) * splat(x.scale[row + r]) * scale);
    }
  }
};

inline Vec to_float(Vec a) { return a; }

// A group's sums, by its scales, to those at `sums`.
template <int Count, class Sum>
inline void add_scaled(const Sum (&acc)[Count][kVecs], const bf16* scales, const Lanes& lanes, float* sums) {
#pragma GCC unroll 8
  for (int v = 0; v < kVecs; ++v) {
    Vec scale = load(scales + v * kLanes, lanes.n[v]);
#pragma GCC unroll 8
    for (int r = 0; r < Count; ++r) {
      float* to = sums + r * kSlice + v * kLanes;
      store(to, fma(to_float(acc[r][v]), scale, load(to)));
    }
  }
}

struct Four {
  using Scale = bf16;

  template <int Count, bool Whole>
  [[gnu::noinline]] static void block(const Rows& x, int64_t row, const uint8_t* slice, int64_t outputs,
                                      const Lanes& lanes, const bf16* scales, Ahead ahead, float* sums) {
    const int64_t group = x.width / x.groups;
    const Ints low = splat(int32_t{0x0f0f0f0f});
    for (int64_t at = 0; at < Count * kSlice; at += kLanes) store(sums + at, zero());
    const uint8_t* at = slice;
    for (int64_t g = 0; g < x.groups; ++g) {
      Ints acc[Count][kVecs];
#pragma GCC unroll 8
      for (int r = 0; r < Count; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) acc[r][v] = splat(x.start[(row + r) * x.groups + g]);
      const int8_t* codes = x.codes + row * x.stride + g * group;
      for (int64_t k = 0; k < group; k += 8, at += 4 * outputs) {
        ahead.operator()<kLines>(at);
        Weights w[kVecs];
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) w[v] = weights(four_inputs<Whole>(at, lanes, v) & low);
        multiply_add(acc, w, codes + k, x.stride);
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) w[v] = weights((four_inputs<Whole>(at, lanes, v) >> 4) & low);
        multiply_add(acc, w, codes + k + 4, x.stride);
      }
      Ahead::beside<kSlice * sizeof(bf16)>(scales + g * outputs);
      add_scaled<Count>(acc, scales + g * outputs, lanes, sums);
    }
#pragma GCC unroll 8
    for (int r = 0; r < Count; ++r)
      for (int v = 0; v < kVecs; ++v) {
        float* to = sums + r * kSlice + v * kLanes;
        store(to, load(to) * splat(x.scale[row + r]));
      }
  }
};

// The same with x in float32. By what input k is divided, from k % 8; in 8 bits as if it were k % 4.
constexpr float kPart[8] = {1.0f,      1.0f / 256,  1.0f,      1.0f / 256,
                            1.0f / 16, 1.0f / 4096, 1.0f / 16, 1.0f / 4096};

template <int Count>
inline void multiply_add(Vec (&acc)[Count][kVecs], const Vec (&w)[kVecs], const float* x, int64_t stride) {
#pragma GCC unroll 8
  for (int r = 0; r < Count; ++r) {
    Vec a = splat(x[r * stride]);
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) acc[r][v] = fma(a, w[v], acc[r][v]);
  }
}

template <int Count>
inline void clear(Vec (&acc)[Count][kVecs]) {
#pragma GCC unroll 8
  for (int r = 0; r < Count; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) acc[r][v] = zero();
}

struct WideEight {
  using Scale = float;

  template <int Count, bool Whole>
  [[gnu::noinline]] static void block(const Rows& x, int64_t row, const uint8_t* slice, int64_t outputs,
                                      const Lanes& lanes, const float* scales, Ahead ahead, float* sums) {
    Vec acc[Count][kVecs];
    clear(acc);
    const float* wide = x.wide + row * x.stride;
    for (int64_t k = 0; k < x.width; k += 4) {
      ahead.operator()<kLines>(slice + k * outputs);
#pragma GCC unroll 4
      for (int part = 0; part < 4; ++part) {
        Vec w[kVecs];
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) {
          Ints four = four_inputs<Whole>(slice + k * outputs, lanes, v);
          if (part >= 2) four = four >> 16;
          w[v] = part % 2 ? field(four, 0xff00, 128 * 256) : field(four, 0xff, 128);
        }
        multiply_add(acc, w, wide + k + part, x.stride);
      }
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      Vec scale = load(scales + v * kLanes, lanes.n[v]);
#pragma GCC unroll 8
      for (int r = 0; r < Count; ++r) store(sums + r * kSlice + v * kLanes, acc[r][v] * scale);
    }
  }
};

struct WideFour {
  using Scale = bf16;

  template <int Count, bool Whole>
  [[gnu::noinline]] static void block(const Rows& x, int64_t row, const uint8_t* slice, int64_t outputs,
                                      const Lanes& lanes, const bf16* scales, Ahead ahead, float* sums) {
    const int64_t group = x.width / x.groups;
    const float* wide = x.wide + row * x.stride;
    for (int64_t at = 0; at < Count * kSlice; at += kLanes) store(sums + at, zero());
    const uint8_t* at = slice;
    for (int64_t g = 0; g < x.groups; ++g) {
      Vec acc[Count][kVecs];
      clear(acc);
      for (int64_t k = g * group; k < (g + 1) * group; k += 8, at += 4 * outputs) {
        ahead.operator()<kLines>(at);
#pragma GCC unroll 8
        for (int part = 0; part < 8; ++part) {
          const int byte = part % 4, shift = byte % 2 * 8 + part / 4 * 4;
          Vec w[kVecs];
#pragma GCC unroll 8
          for (int v = 0; v < kVecs; ++v) {
            Ints eight = four_inputs<Whole>(at, lanes, v);
            if (byte >= 2) eight = eight >> 16;
            w[v] = field(eight, 15 << shift, static_cast<float>(8 << shift));
          }
          multiply_add(acc, w, wide + k + part, x.stride);
        }
      }
      Ahead::beside<kSlice * sizeof(bf16)>(scales + g * outputs);
      add_scaled<Count>(acc, scales + g * outputs, lanes, sums);
    }
  }
};

template <class Kind, class Out>
struct Sweep {
  const QuantizedLinear& call;
  const Rows& x;
  float* sums;  // [kRows][kSlice]

  template <int Count, bool Whole>
  void block(int64_t row, int64_t output, const uint8_t* from, int64_t in_panel, const Lanes& lanes,
             const typename Kind::Scale* scales, const Ahead& ahead) const {
    Kind::template block<Count, Whole>(x, row, from, in_panel, lanes, scales, ahead, sums);
    Out* out = static_cast<Out*>(call.out) + row * call.out_stride + output;
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      if (lanes.n[v] == 0) break;
      Vec b = call.bias ? load(call.bias + output + v * kLanes, lanes.n[v]) : zero();
      for (int r = 0; r < Count; ++r) {
        Out* to = out + r * call.out_stride + v * kLanes;
        Vec sum = load(sums + r * kSlice + v * kLanes) + b;
        Whole ? store(to, sum) : store(to, sum, lanes.n[v]);
      }
    }
  }

  template <bool Whole>
  void slice(int64_t output, const uint8_t* from, int64_t in_panel, const typename Kind::Scale* scales,
             const uint8_t* next) const {
    const Lanes lanes(in_panel - output % kPanel);
    const Passes passes(x.count, kRows);
    int64_t row = 0;
    for (int64_t pass = 0; pass < passes.count; ++pass) {
      const Ahead ahead(from, in_panel * row_bytes(), next, 4 * in_panel, pass, passes.count);
      switch (passes.rows(pass)) {
        case 6: block<6, Whole>(row, output, from, in_panel, lanes, scales, ahead); break;
        case 5: block<5, Whole>(row, output, from, in_panel, lanes, scales, ahead); break;
        case 4: block<4, Whole>(row, output, from, in_panel, lanes, scales, ahead); break;
        case 3: block<3, Whole>(row, output, from, in_panel, lanes, scales, ahead); break;
        case 2: block<2, Whole>(row, output, from, in_panel, lanes, scales, ahead); break;
        case 1: block<1, Whole>(row, output, from, in_panel, lanes, scales, ahead); break;
      }
      row += passes.rows(pass);
    }
  }

  int64_t row_bytes() const { return call.group ? x.width / 2 : x.width; }

  // `apart`: panels from one that a thread takes to the next, as a rule.
  void panel(int64_t number, int64_t apart) const {
    const int64_t begin = number * kPanel, in_panel = std::min(kPanel, call.outputs - begin);
    const bool more = begin + (apart + 1) * kPanel <= call.outputs;
    for (int64_t at = 0; at < in_panel; at += kSlice) {
      const uint8_t* from = call.weight + begin * row_bytes() + 4 * at;
      const uint8_t* next = more ? from + apart * kPanel * row_bytes() : nullptr;
      const auto* scales = static_cast<const typename Kind::Scale*>(call.scales) + begin * x.groups + at;
      if (in_panel - at >= kSlice) {
        slice<true>(begin + at, from, in_panel, scales, next);
      } else {
        slice<false>(begin + at, from, in_panel, scales, next);
      }
    }
  }
};

template <class Kind>
void sweep(const QuantizedLinear& call, const Rows& x, int64_t number, int64_t apart) {
  alignas(64) float sums[kRows * kSlice];
  switch (call.out_format) {
    case kFloat32: return Sweep<Kind, float>{call, x, sums}.panel(number, apart);
    case kBfloat16: return Sweep<Kind, bf16>{call, x, sums}.panel(number, apart);
    case kFloat16: return Sweep<Kind, fp16>{call, x, sums}.panel(number, apart);
  }
}

// Calls work(a number of the format).
template <class Work>
void by_format(Format format, Work&& work) {
  switch (format) {
    case kFloat32: return work(float{});
    case kBfloat16: return work(bf16{});
    case kFloat16: return work(fp16{});
  }
}

// Of eight halves of a byte in a row, 0 to 7 from the lowest: 0 4 1 5 2 6 3 7.
inline uint32_t halves_apart(uint32_t eight) {
  auto spread = [](uint32_t four) {
    four = (four | four << 8) & 0x00ff00ffu;
    return (four | four << 4) & 0x0f0f0f0fu;
  };
  return spread(eight & 0xffffu) | spread(eight >> 16) << 4;
}

}  // namespace

MadeRows::MadeRows(const QuantizedLinear& call, int64_t count, void* memory)
    : count(count), width(up_to(call.width, 4)), groups(call.group ? call.width / call.group : 1),
      stride(up_to(width, 64)) {
  char* at = static_cast<char*>(memory);
  start = reinterpret_cast<int32_t*>(at);
  at += up_to(count * groups * 4, 64);
  scale = reinterpret_cast<float*>(at);
  at += up_to(count * 4, 64);
  codes = reinterpret_cast<int8_t*>(at);
  wide = reinterpret_cast<float*>(at);
}

int64_t MadeRows::bytes(const QuantizedLinear& call, int64_t count) {
  const MadeRows rows(call, count, nullptr);
  return up_to(count * rows.groups * 4, 64) + up_to(count * 4, 64) + count * rows.stride * (call.round_input ? 1 : 4);
}

MadeRows MadeRows::part(int64_t first, int64_t some) const {
  MadeRows rows = *this;
  rows.count = some;
  rows.codes += first * stride;
  rows.start += first * groups;
  rows.scale += first;
  rows.wide += first * stride;
  return rows;
}

void make_row(const QuantizedLinear& call, const void* from, const MadeRows& rows, int64_t row) {
  by_format(call.format, [&](auto number) {
    const auto* x = static_cast<const decltype(number)*>(from);
    if (call.round_input) {
      round_row(x, call.width, call.group ? call.group : call.width, call.group ? 8 : 128, rows.stride,
                rows.codes + row * rows.stride, rows.start + row * rows.groups, rows.scale + row);
      return;
    }
    float* to = rows.wide + row * rows.stride;
    float parts[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) parts[lane] = kPart[lane % (call.group ? 8 : 4)];
    int64_t k = 0;
    for (; k + kLanes <= call.width; k += kLanes) store(to + k, load(x + k) * load(parts));
    for (; k < rows.width; ++k) to[k] = k < call.width ? as_float(x[k]) * parts[k % kLanes] : 0.0f;
  });
}

void quantized_panel(const QuantizedLinear& call, const MadeRows& rows, int64_t number, int64_t apart) {
  if (call.round_input) {
    call.group ? sweep<Four>(call, rows, number, apart) : sweep<Eight>(call, rows, number, apart);
  } else {
    call.group ? sweep<WideFour>(call, rows, number, apart) : sweep<WideEight>(call, rows, number, apart);
  }
}

int64_t quantized_scratch(const QuantizedLinear& call) { return MadeRows::bytes(call, call.rows); }

void quantized_linear(Pool& pool, const QuantizedLinear& call, void* scratch) {
  const MadeRows rows(call, call.rows, scratch);
  const int64_t size = call.format == kFloat32 ? 4 : 2;
  pool.each(call.rows, [&](int64_t row, int) {
    make_row(call, static_cast<const char*>(call.x) + row * call.stride * size, rows, row);
  });
  pool.each(panels(call.outputs), [&](int64_t number, int) { quantized_panel(call, rows, number, pool.size()); });
}

int64_t pack_quantized_scratch(int threads, int64_t row_bytes) { return threads * kPanel * row_bytes; }

void pack_quantized(Pool& pool, void* weight, int64_t outputs, int64_t row_bytes, bool four_bits, void* scratch) {
  pool.each(panels(outputs), [&](int64_t number, int thread) {
    const int64_t begin = number * kPanel, in_panel = std::min(kPanel, outputs - begin);
    uint8_t* rows = static_cast<uint8_t*>(weight) + begin * row_bytes;
    uint8_t* panel = static_cast<uint8_t*>(scratch) + thread * kPanel * row_bytes;
    for (int64_t n = 0; n < in_panel; ++n)
      for (int64_t at = 0; at < row_bytes; at += 4) {
        uint32_t four;
        std::memcpy(&four, rows + n * row_bytes + at, 4);
        four = four_bits ? halves_apart(four) : four ^ 0x80808080u;
        std::memcpy(panel + at * in_panel + 4 * n, &four, 4);
      }
    std::memcpy(rows, panel, in_panel * row_bytes);
  });
}

void unpack_quantized(Pool& pool, const UnpackQuantized& call) {
  const int64_t group = call.group, outputs = call.outputs, width = call.width;
  const int64_t row_bytes = group ? width / 2 : up_to(width, 4), groups = group ? width / group : 1;
  const Ints added = splat(int32_t{group ? 8 : 128});
  by_format(call.format, [&](auto kind) {
    using Out = decltype(kind);
    pool.each(call.rows, [&](int64_t number, int) {
      const int64_t begin = call.ids[number] / kPanel * kPanel, in_panel = std::min(kPanel, outputs - begin);
      const int64_t n = call.ids[number] - begin;
      const uint8_t* at = call.weight + begin * row_bytes + 4 * n;
      const bf16* group_scales = static_cast<const bf16*>(call.scales) + begin * groups + n;
      Out* out = static_cast<Out*>(call.out) + number * width;
      // kLanes inputs at a time, of which a group has a multiple
      for (int64_t k = 0; k < width; k += kLanes) {
        uint8_t codes[kLanes] = {};
        float scale;
        if (group) {
          for (int eight = 0; eight < kLanes; eight += 8, at += 4 * in_panel)
            for (int byte = 0; byte < 4; ++byte) {
              codes[eight + byte] = at[byte] & 15;
              codes[eight + 4 + byte] = at[byte] >> 4;
            }
          scale = as_float(group_scales[k / group * in_panel]);
        } else {
          for (int four = 0; four < kLanes && k + four < width; four += 4, at += 4 * in_panel)
            std::memcpy(codes + four, at, 4);
          scale = static_cast<const float*>(call.scales)[call.ids[number]];
        }
        Vec value = to_float(widen_bytes(codes) - added) * splat(scale);
        if (k + kLanes <= width) {
          store(out + k, value);
        } else {
          store(out + k, value, static_cast<int>(width - k));
        }
      }
    });
  });
}

}  // namespace quire
