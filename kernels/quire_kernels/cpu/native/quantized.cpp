// Matrix products with a weight in 8 or 4 bits that was packed once.
//
// Panels of 64 outputs, as in gemm.cpp, each of two strips of 32, the last of what is left; within a strip of N outputs
// four inputs of an output lie together, which is what vpdpbusd takes. A weight is stored without its sign, by adding 128
// or 8 to each number:
//
//     8 bits    [K / 4][N][4]     number + 128, K rounded up to a multiple of 4
//     4 bits    [K / 8][N][4]     number + 8: of eight inputs the first four in the low halves, the others in the high
//
// A panel is a task; a strip is swept by some rows at a time: by 12 times 32 sums, which with two vectors of weights fill
// the registers, so that the first cache gives one number of x for every two products. In 4 bits it is 8 times 32, for
// what groups come to takes registers, too; and the first sweep keeps in bytes what it has taken apart, for the others.
// Up to 6 rows sweep both strips of a panel side by side.
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
#include <atomic>

#include "ahead.h"
#include "round.h"
#include "simd.h"

namespace quire {

namespace {

constexpr int64_t kStrip = 32;  // half a panel
constexpr int kVecs = 2;
constexpr int kSlice = kVecs * kLanes;  // outputs of a panel that are in registers at once
// Rows that are swept together, by how many registers there are; where groups have scales, each sum takes two.
constexpr int kRows = sizeof(Vec) == 64 ? 12 : 4;
constexpr int kRowsInGroups = sizeof(Vec) == 64 ? 8 : 4;
constexpr int64_t kStep = 4 * kStrip;  // bytes: four of each output
constexpr int64_t kTurn = 2 * kStep;   // that are read between two looks ahead

int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// The scales of groups lie in panels as `pack` makes them: where an output's first one is, and how far the next.
struct GroupScales {
  const bf16* first;
  int64_t apart;
  GroupScales(const void* scales, int64_t outputs, int64_t groups, int64_t output) {
    const int64_t begin = output / kPanel * kPanel;
    first = static_cast<const bf16*>(scales) + begin * groups + output - begin;
    apart = std::min(kPanel, outputs - begin);
  }
};

using Rows = MadeRows;

// The places of some rows that move on together. Three rows share a pointer, as an address takes one and twice a
// distance; that the pointers are related must not be known, or they are all made of one again in every step.
template <int Count, class T>
class Places {
 public:
  Places(const T* first, int64_t stride) : stride_(stride) {
#pragma GCC unroll 8
    for (int i = 0; i < kPointers; ++i) {
      at_[i] = first + 3 * i * stride;
      asm("" : "+r"(at_[i]));
    }
  }
  const T* operator[](int row) const { return at_[row / 3] + row % 3 * stride_; }
  void on(int64_t numbers) {
#pragma GCC unroll 8
    for (int i = 0; i < kPointers; ++i) at_[i] += numbers;
  }

 private:
  static constexpr int kPointers = (Count + 2) / 3;
  const T* at_[kPointers];
  int64_t stride_;
};

template <int Count, int V>
inline void multiply_add(Ints (&acc)[Count][V], const Weights (&w)[V], const Places<Count, int8_t>& codes, int64_t k) {
#pragma GCC unroll 16
  for (int r = 0; r < Count; ++r) {
    Inputs x = inputs(four_codes(codes[r] + k));
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[r][v] = dot(acc[r][v], w[v], x);
  }
}

// Of vector `v`, four inputs of each output. With more vectors than a slice has the others are of the strip beside it.
inline Ints four_inputs(const uint8_t* at, int64_t beside, int v) {
  return load_ints(at + v / kVecs * beside + v % kVecs * 4 * kLanes);
}

template <int Count, int V>
inline void multiply_add(Ints (&acc)[Count][V], const uint8_t* at, int64_t beside, const Places<Count, int8_t>& codes,
                         int64_t k) {
  Weights w[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) w[v] = weights(four_inputs(at, beside, v));
  multiply_add(acc, w, codes, k);
}

template <int Count, int V>
inline void begin(Ints (&acc)[Count][V], const int32_t* start, int64_t stride) {
#pragma GCC unroll 16
  for (int r = 0; r < Count; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[r][v] = splat(start[r * stride]);
}

// Memory that is asked for before each turn.
struct Asked {
  Share own, other;  // of the strip, and of the one that is swept along

  template <int V>
  void ask() {
    own();
    if constexpr (V > kVecs) other();
  }
};

// A slice of a panel for some rows. The results are in float32 at `sums` [rows][kSlice], the scale of the row in them.
struct Slice {
  const uint8_t* from;  // a step is kStep bytes
  const void* scales;   // of the kind's own
  int64_t apart;        // numbers from the scales of one group to the next
  int64_t beside;       // bytes to the strip that is swept along
  int n[2 * kVecs];     // outputs of each vector that there are
  uint8_t* kept;        // room for the slice in bytes
  float* kept_scales;   // [groups][kSlice]
};

template <class T>
inline Vec scales_of(const Slice& slice, int64_t group, int v) {
  const T* at = static_cast<const T*>(slice.scales) + group * slice.apart + v * kLanes;
  return slice.n[v] == kLanes ? load(at) : load(at, slice.n[v]);
}

struct Eight {
  static constexpr int kMost = kRows;

  template <int Count, int V>
  [[gnu::noinline]] static void block(const Rows& x, int64_t row, const Slice& slice, Asked ahead, float* sums) {
    Ints acc[Count][V];
    begin(acc, x.start + row, 1);
    Places<Count, int8_t> codes(x.codes + row * x.stride, x.stride);
    const uint8_t* at = slice.from;
    int64_t k = 0;
    for (; k + 16 <= x.width; k += 16, at += 4 * kStep, codes.on(16)) {
#pragma GCC unroll 4
      for (int step = 0; step < 4; ++step) {
        if (step * kStep % kTurn == 0) ahead.ask<V>();
        multiply_add(acc, at + step * kStep, slice.beside, codes, 4 * step);
      }
    }
    for (; k < x.width; k += 4, at += kStep, codes.on(4)) multiply_add(acc, at, slice.beside, codes, 0);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      Vec scale = scales_of<float>(slice, 0, v);
#pragma GCC unroll 16
      for (int r = 0; r < Count; ++r)
        store(sums + (r * V + v) * kLanes, to_float(acc[r][v]) * splat(x.scale[row + r]) * scale);
    }
  }
};

inline Vec to_float(Vec a) { return a; }

// A group's sums, by its scales, to those of the groups before. These stay in registers, too, or most of them: what is
// read after a store waits for it where the last twelve bits of the addresses look alike, and then the next group waits
// for this one.
template <int Count, int V, class Sum>
inline void add_scaled(const Sum (&acc)[Count][V], const Vec (&scales)[V], Vec (&total)[Count][V]) {
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v)
#pragma GCC unroll 16
    for (int r = 0; r < Count; ++r) total[r][v] = fma(to_float(acc[r][v]), scales[v], total[r][v]);
}

template <int Count, int V>
inline void clear(Vec (&acc)[Count][V]) {
#pragma GCC unroll 16
  for (int r = 0; r < Count; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[r][v] = zero();
}

// Where four bits come from: as they lie; as they lie, and kept in bytes for the rows that follow; or what was kept.
enum class Source { kHalves, kHalvesKept, kKept };

template <Source source>
struct Four {
  static constexpr int kMost = kRowsInGroups;

  // 16 inputs.
  template <int Count, int V>
  static inline void turn(Ints (&acc)[Count][V], const uint8_t*& at, int64_t beside, uint8_t*& kept,
                          Places<Count, int8_t>& codes) {
#pragma GCC unroll 2
    for (int eight = 0; eight < 2; ++eight) {
      if constexpr (source == Source::kKept) {
        multiply_add(acc, kept, 0, codes, 8 * eight);
        multiply_add(acc, kept + kStep, 0, codes, 8 * eight + 4);
      } else {
        if constexpr (source == Source::kHalves && Count <= 4) {
          Share::near<kStep>(at);
          if constexpr (V > kVecs) Share::near<kStep>(at + beside);
        }
        const Ints low = splat(int32_t{0x0f0f0f0f});
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          Weights w[V];
#pragma GCC unroll 8
          for (int v = 0; v < V; ++v) {
            Ints four = four_inputs(at, beside, v);
            four = (half ? four >> 4 : four) & low;
            w[v] = weights(four);
            if constexpr (source == Source::kHalvesKept) store_ints(kept + half * kStep + v * 4 * kLanes, four);
          }
          multiply_add(acc, w, codes, 8 * eight + 4 * half);
        }
        at += kStep;
      }
      kept += 2 * kStep;
    }
    codes.on(16);
  }

  template <int Count, int V, bool Short>
  static inline void groups(const Rows& x, int64_t row, const Slice& slice, Asked& ahead, Vec (&total)[Count][V]) {
    const int64_t turns = x.width / x.groups / 16;
    Places<Count, int8_t> codes(x.codes + row * x.stride, x.stride);
    const int32_t* start = x.start + row * x.groups;
    const uint8_t* at = slice.from;
    uint8_t* kept = slice.kept;
    float* kept_scales = slice.kept_scales;
    for (int64_t g = 0; g < x.groups; ++g, ++start, kept_scales += kSlice) {
      Ints acc[Count][V];
      begin(acc, start, x.groups);
      if constexpr (Short) {  // 32 inputs
#pragma GCC unroll 2
        for (int number = 0; number < 2; ++number) {
          ahead.ask<V>();
          turn(acc, at, slice.beside, kept, codes);
        }
      } else {
        for (int64_t number = 0; number < turns; ++number) {
          ahead.ask<V>();
          turn(acc, at, slice.beside, kept, codes);
        }
      }
      Vec scales[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        scales[v] = source == Source::kKept ? load(kept_scales + v * kLanes) : scales_of<bf16>(slice, g, v);
        if constexpr (source == Source::kHalvesKept) store(kept_scales + v * kLanes, scales[v]);
      }
      if constexpr (source != Source::kKept)
        Ahead::beside<V * kLanes * sizeof(bf16)>(static_cast<const bf16*>(slice.scales) + g * slice.apart);
      add_scaled(acc, scales, total);
    }
  }

  template <int Count, int V>
  [[gnu::noinline]] static void block(const Rows& x, int64_t row, const Slice& slice, Asked ahead, float* sums) {
    Vec total[Count][V];
    clear(total);
    x.width == 32 * x.groups ? groups<Count, V, true>(x, row, slice, ahead, total)
                             : groups<Count, V, false>(x, row, slice, ahead, total);
#pragma GCC unroll 16
    for (int r = 0; r < Count; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) store(sums + (r * V + v) * kLanes, total[r][v] * splat(x.scale[row + r]));
  }
};

// The same with x in float32. By what input k is divided, from k % 8; in 8 bits as if it were k % 4.
constexpr float kPart[8] = {1.0f,      1.0f / 256,  1.0f,      1.0f / 256,
                            1.0f / 16, 1.0f / 4096, 1.0f / 16, 1.0f / 4096};

template <int Count, int V>
inline void multiply_add(Vec (&acc)[Count][V], const Vec (&w)[V], const Places<Count, float>& x, int64_t k) {
#pragma GCC unroll 16
  for (int r = 0; r < Count; ++r) {
    Vec a = splat(x[r][k]);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[r][v] = fma(a, w[v], acc[r][v]);
  }
}

struct WideEight {
  static constexpr int kMost = kRows;

  template <int Count, int V>
  [[gnu::noinline]] static void block(const Rows& x, int64_t row, const Slice& slice, Asked ahead, float* sums) {
    Vec acc[Count][V];
    clear(acc);
    Places<Count, float> wide(x.wide + row * x.stride, x.stride);
    const uint8_t* at = slice.from;
    for (int64_t k = 0; k < x.width; k += 4, at += kStep, wide.on(4)) {
      if (k % 8 == 0) ahead.ask<V>();
#pragma GCC unroll 4
      for (int part = 0; part < 4; ++part) {
        Vec w[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
          Ints four = four_inputs(at, slice.beside, v);
          if (part >= 2) four = four >> 16;
          w[v] = part % 2 ? field(four, 0xff00, 128 * 256) : field(four, 0xff, 128);
        }
        multiply_add(acc, w, wide, part);
      }
    }
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      Vec scale = scales_of<float>(slice, 0, v);
#pragma GCC unroll 16
      for (int r = 0; r < Count; ++r) store(sums + (r * V + v) * kLanes, acc[r][v] * scale);
    }
  }
};

struct WideFour {
  static constexpr int kMost = kRowsInGroups;

  template <int Count, int V>
  [[gnu::noinline]] static void block(const Rows& x, int64_t row, const Slice& slice, Asked ahead, float* sums) {
    const int64_t group = x.width / x.groups;
    Vec total[Count][V];
    clear(total);
    Places<Count, float> wide(x.wide + row * x.stride, x.stride);
    const uint8_t* at = slice.from;
    for (int64_t g = 0; g < x.groups; ++g) {
      Vec acc[Count][V];
      clear(acc);
      for (int64_t k = 0; k < group; k += 8, at += kStep, wide.on(8)) {
        if (k % 16 == 0) ahead.ask<V>();
#pragma GCC unroll 8
        for (int part = 0; part < 8; ++part) {
          const int byte = part % 4, shift = byte % 2 * 8 + part / 4 * 4;
          Vec w[V];
#pragma GCC unroll 8
          for (int v = 0; v < V; ++v) {
            Ints eight = four_inputs(at, slice.beside, v);
            if (byte >= 2) eight = eight >> 16;
            w[v] = field(eight, 15 << shift, static_cast<float>(8 << shift));
          }
          multiply_add(acc, w, wide, part);
        }
      }
      Ahead::beside<V * kLanes * sizeof(bf16)>(static_cast<const bf16*>(slice.scales) + g * slice.apart);
      Vec scales[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) scales[v] = scales_of<bf16>(slice, g, v);
      add_scaled(acc, scales, total);
    }
#pragma GCC unroll 16
    for (int r = 0; r < Count; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) store(sums + (r * V + v) * kLanes, total[r][v]);
  }
};

// So few rows that sums of one strip would wait for each other: two are swept side by side.
constexpr int kFew = sizeof(Vec) == 64 ? 6 : 0;

using Some = void (*)(int64_t rows, const Rows&, int64_t row, const Slice&, const Asked&, float* sums);

template <class Kind, int Count, int V>
void some_rows(int64_t rows, const Rows& x, int64_t row, const Slice& slice, const Asked& ahead, float* sums) {
  if constexpr (Count > 0) {
    rows == Count ? Kind::template block<Count, V>(x, row, slice, ahead, sums)
                  : some_rows<Kind, Count - 1, V>(rows, x, row, slice, ahead, sums);
  }
}

// First what sweeps a strip that comes from memory, alone or with others to follow; then what the others are; and what
// sweeps two for few rows.
struct Kinds {
  Some alone, first, others, beside;
  int most;  // rows
  template <class Alone, class First = Alone, class Others = First>
  static Kinds of() {
    constexpr int most = Alone::kMost;
    return {some_rows<Alone, most, kVecs>, some_rows<First, most, kVecs>, some_rows<Others, most, kVecs>,
            some_rows<Alone, kFew, 2 * kVecs>, most};
  }
};

// How the room of a thread is cut: a strip with all its outputs, a strip in bytes, the scales of a slice.
struct Room {
  uint8_t* whole;
  uint8_t* kept;
  float* kept_scales;
  int64_t bytes;

  Room(const QuantizedLinear& call, int64_t rows, void* memory) {
    const int64_t width = up_to(call.width, 4), row_bytes = call.group ? width / 2 : width;
    const bool keeps = call.group && call.round_input && rows > kRowsInGroups;
    whole = static_cast<uint8_t*>(memory);
    kept = whole + (call.outputs % kStrip ? up_to(kStrip * row_bytes, 64) : 0);
    kept_scales = reinterpret_cast<float*>(kept + (keeps ? kStrip * width : 0));
    bytes = kept - whole + (keeps ? kStrip * width + width / call.group * kSlice * 4 : 0);
  }
};

struct Sweep {
  const QuantizedLinear& call;
  const Rows& x;
  const Kinds kinds;
  const Room room;
  float* sums;  // [kRows][kSlice]

  int64_t row_bytes() const { return call.group ? x.width / 2 : x.width; }

  int64_t strip_bytes() const { return kStrip * row_bytes(); }

  // `next`: the panel that this thread takes after it.
  void panel(int64_t number, int64_t next) const {
    constexpr int64_t strips = kPanel / kStrip;
    const int64_t end = std::min((call.outputs + kStrip - 1) / kStrip, (number + 1) * strips);
    if (x.count <= kFew && (number + 1) * kPanel <= call.outputs) {
      static_assert(strips == 2 && (kFew == 0 || kStrip == kSlice));
      const int64_t strip = number * strips;
      const Slice slice = slice_at(strip * kStrip, kPanel, call.weight + strip * strip_bytes());
      const Asked ahead{share(slice.from, next * strips, 0, 1),
                        share(slice.from + strip_bytes(), next * strips + 1, 0, 1)};
      kinds.beside(x.count, x, 0, slice, ahead, sums);
      put(0, x.count, strip * kStrip, slice, 2 * kVecs);
      return;
    }
    for (int64_t strip = number * strips; strip < end; ++strip)
      sweep(strip, strip + 1 < end ? strip + 1 : next * strips);
  }

 private:
  // The vectors of `outputs` outputs from `begin` on.
  Slice slice_at(int64_t begin, int64_t outputs, const uint8_t* from) const {
    Slice slice{from, nullptr, 0, strip_bytes(), {}, room.kept + begin % kStrip * 4, room.kept_scales};
    if (call.group) {
      const GroupScales scales(call.scales, call.outputs, x.groups, begin);
      slice.scales = scales.first;
      slice.apart = scales.apart;
    } else {
      slice.scales = static_cast<const float*>(call.scales) + begin;
    }
    for (int v = 0; v < 2 * kVecs; ++v)
      slice.n[v] = static_cast<int>(std::clamp<int64_t>(outputs - v * kLanes, 0, kLanes));
    return slice;
  }

  // What sweep `number` of `count` over a strip at `from` asks for, if strip `next` comes after it.
  Share share(const uint8_t* from, int64_t next, int64_t number, int64_t count) const {
    const uint8_t* then = next < call.outputs / kStrip ? call.weight + next * strip_bytes() : nullptr;
    return Share(from, strip_bytes(), then, kTurn, x.count <= kinds.most, number, count);
  }

  void sweep(int64_t strip, int64_t next) const {
    const int64_t begin = strip * kStrip, in_strip = std::min(kStrip, call.outputs - begin);
    const uint8_t* from = call.weight + begin * row_bytes();
    if (in_strip < kStrip) {
      for (int64_t at = 0; at < row_bytes() / 4; ++at)
        std::memcpy(room.whole + at * kStep, from + at * 4 * in_strip, 4 * in_strip);
      from = room.whole;
    }
    const Passes passes(x.count, kinds.most);
    const int64_t sweeps = (in_strip + kSlice - 1) / kSlice * passes.count;
    int64_t number = 0;
    for (int64_t at = 0; at < in_strip; at += kSlice) {
      const Slice slice = slice_at(begin + at, in_strip - at, from + 4 * at);
      int64_t row = 0;
      for (int64_t pass = 0; pass < passes.count; ++pass, ++number) {
        const int64_t rows = passes.rows(pass);
        const Share own = share(from, next, number, sweeps);
        (passes.count == 1 ? kinds.alone : pass == 0 ? kinds.first : kinds.others)(rows, x, row, slice, {own, own}, sums);
        put(row, rows, begin + at, slice, kVecs);
        row += rows;
      }
    }
  }

  void put(int64_t row, int64_t rows, int64_t output, const Slice& slice, int vecs) const {
    switch (call.out_format) {
      case kFloat32: return put_as<float>(row, rows, output, slice, vecs);
      case kBfloat16: return put_as<bf16>(row, rows, output, slice, vecs);
      case kFloat16: return put_as<fp16>(row, rows, output, slice, vecs);
    }
  }

  template <class Out>
  void put_as(int64_t row, int64_t rows, int64_t output, const Slice& slice, int vecs) const {
    Out* out = static_cast<Out*>(call.out) + row * call.out_stride + output;
    for (int v = 0; v < vecs; ++v) {
      const int n = slice.n[v];
      if (n == 0) break;
      Vec b = call.bias ? load(call.bias + output + v * kLanes, n) : zero();
      for (int64_t r = 0; r < rows; ++r) {
        Out* to = out + r * call.out_stride + v * kLanes;
        Vec sum = load(sums + (r * vecs + v) * kLanes) + b;
        n == kLanes ? store(to, sum) : store(to, sum, n);
      }
    }
  }
};

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
      // an odd number of lines, or the first cache would have few places for all rows
      stride(up_to(width, 64) | 64) {
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

int64_t quantized_room(const QuantizedLinear& call, int64_t rows) { return up_to(Room(call, rows, nullptr).bytes, 64); }

void quantized_panel(const QuantizedLinear& call, const MadeRows& rows, int64_t number, int64_t apart, void* room) {
  using enum Source;
  const Kinds kinds = !call.round_input ? (call.group ? Kinds::of<WideFour>() : Kinds::of<WideEight>())
                      : call.group      ? Kinds::of<Four<kHalves>, Four<kHalvesKept>, Four<kKept>>()
                                        : Kinds::of<Eight>();
  alignas(64) float sums[kRows * kSlice];
  const Sweep sweep{call, rows, kinds, Room(call, rows.count, room), sums};
  sweep.panel(number, number + apart);
}

int64_t quantized_scratch(int threads, const QuantizedLinear& call) {
  return threads * quantized_room(call, call.rows) + MadeRows::bytes(call, call.rows);
}

void quantized_linear(Pool& pool, const QuantizedLinear& call, void* scratch) {
  char* rooms = static_cast<char*>(scratch);
  const int64_t room = quantized_room(call, call.rows), count = panels(call.outputs);
  const MadeRows rows(call, call.rows, rooms + pool.size() * room);
  const int64_t size = call.format == kFloat32 ? 4 : 2;
  pool.each(call.rows, [&](int64_t row, int) {
    make_row(call, static_cast<const char*>(call.x) + row * call.stride * size, rows, row);
  });
  // a thread says which panel it takes next before it begins one, and asks for it meanwhile
  std::atomic<int64_t> taken{0};
  pool.each(std::min<int64_t>(pool.size(), count), [&](int64_t, int thread) {
    int64_t number = taken.fetch_add(1, std::memory_order_relaxed);
    while (number < count) {
      const int64_t next = taken.fetch_add(1, std::memory_order_relaxed);
      quantized_panel(call, rows, number, next - number, rooms + thread * room);
      number = next;
    }
  });
}

int64_t pack_quantized_scratch(int threads, int64_t row_bytes) { return threads * kStrip * row_bytes; }

void pack_quantized(Pool& pool, void* weight, int64_t outputs, int64_t row_bytes, bool four_bits, void* scratch) {
  pool.each((outputs + kStrip - 1) / kStrip, [&](int64_t number, int thread) {
    const int64_t begin = number * kStrip, in_strip = std::min(kStrip, outputs - begin);
    uint8_t* rows = static_cast<uint8_t*>(weight) + begin * row_bytes;
    uint8_t* strip = static_cast<uint8_t*>(scratch) + thread * kStrip * row_bytes;
    for (int64_t n = 0; n < in_strip; ++n)
      for (int64_t at = 0; at < row_bytes; at += 4) {
        uint32_t four;
        std::memcpy(&four, rows + n * row_bytes + at, 4);
        four = four_bits ? halves_apart(four) : four ^ 0x80808080u;
        std::memcpy(strip + at * in_strip + 4 * n, &four, 4);
      }
    std::memcpy(rows, strip, in_strip * row_bytes);
  });
}

void unpack_quantized(Pool& pool, const UnpackQuantized& call) {
  const int64_t group = call.group, outputs = call.outputs, width = call.width;
  const int64_t row_bytes = group ? width / 2 : up_to(width, 4), groups = group ? width / group : 1;
  const Ints added = splat(int32_t{group ? 8 : 128});
  by_format(call.format, [&](auto kind) {
    using Out = decltype(kind);
    pool.each(call.rows, [&](int64_t number, int) {
      const int64_t begin = call.ids[number] / kStrip * kStrip, in_strip = std::min(kStrip, outputs - begin);
      const int64_t n = call.ids[number] - begin;
      const uint8_t* at = call.weight + begin * row_bytes + 4 * n;
      const GroupScales scales(call.scales, outputs, groups, call.ids[number]);
      Out* out = static_cast<Out*>(call.out) + number * width;
      // kLanes inputs at a time, of which a group has a multiple
      for (int64_t k = 0; k < width; k += kLanes) {
        uint8_t codes[kLanes] = {};
        float scale;
        if (group) {
          for (int eight = 0; eight < kLanes; eight += 8, at += 4 * in_strip)
            for (int byte = 0; byte < 4; ++byte) {
              codes[eight + byte] = at[byte] & 15;
              codes[eight + 4 + byte] = at[byte] >> 4;
            }
          scale = as_float(scales.first[k / group * scales.apart]);
        } else {
          for (int four = 0; four < kLanes && k + four < width; four += 4, at += 4 * in_strip)
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
