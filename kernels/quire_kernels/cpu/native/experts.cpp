// A layer of experts as one operation. Rows are sorted by expert, in order, so that each weight is read once a step and
// meets all its rows; whoever gets nothing is not read.
//
//     1    x of each row and each of its experts, as it is multiplied            a task: one of them
//     2    silu(gate(x)) · up(x)                                                 a task: a panel of one expert
//     3    that, as it is multiplied                                             a task: one of them
//     4    down of it, times its share, added to the row's sum                   a task: a panel of all experts
//
// In 4 experts come in the order of their numbers, and a panel of outputs belongs to one thread. So a row's sum has the
// same terms in the same order whatever else is in the step.
//
// Legend: P pairs of a row and an expert.
#include "experts.h"

#include <algorithm>
#include <cmath>

#include "simd.h"

namespace quire {

namespace {

constexpr int64_t kTogether = 96;  // rows of an expert whose results a thread keeps at a time, on its stack

int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
int64_t size_of(Format format) { return format == kFloat32 ? 4 : 2; }

// Memory, piece by piece.
class Pieces {
 public:
  explicit Pieces(void* memory) : at_(static_cast<char*>(memory)) {}
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(at_);
    at_ += up_to(count * static_cast<int64_t>(sizeof(T)), 64);
    return piece;
  }
  char* end() const { return at_; }

 private:
  char* at_;
};

// Rows of one width as they are multiplied with weights in a float format.
class FloatRows {
 public:
  FloatRows(const Linear& of, int64_t, void* memory)
      : of_(of), bytes_(made_row_bytes(of.format, of.width)), memory_(static_cast<char*>(memory)) {}
  static int64_t bytes(const Linear& of, int64_t count) { return count * made_row_bytes(of.format, of.width); }
  static int64_t room(const Linear&) { return 0; }

  void make(const void* from, int64_t row) const { make_row(of_.format, from, of_.width, memory_ + row * bytes_); }

  // A panel of the product with `count` rows, to `out` [count][kPanel]; `room` is the thread's own.
  void panel(const Linear& product, int64_t first, int64_t count, int64_t number, int64_t apart, void*,
             float* out) const {
    Linear call = product;
    call.x = memory_ + first * bytes_;
    call.stride = product.width;
    call.rows = count;
    call.out_format = kFloat32;
    call.out = out - number * kPanel;  // the panel's own outputs come to lie at `out`
    call.out_stride = kPanel;
    linear_panel(call, number, apart);
  }

 private:
  const Linear& of_;
  int64_t bytes_;
  char* memory_;
};

// The same with quantised weights.
class WholeRows {
 public:
  WholeRows(const QuantizedLinear& of, int64_t count, void* memory) : of_(of), rows_(of, count, memory) {}
  static int64_t bytes(const QuantizedLinear& of, int64_t count) { return MadeRows::bytes(of, count); }
  static int64_t room(const QuantizedLinear& of) { return quantized_room(of, kTogether); }

  void make(const void* from, int64_t row) const { make_row(of_, from, rows_, row); }

  void panel(const QuantizedLinear& product, int64_t first, int64_t count, int64_t number, int64_t apart, void* room,
             float* out) const {
    QuantizedLinear call = product;
    call.rows = count;
    call.out_format = kFloat32;
    call.out = out - number * kPanel;
    call.out_stride = kPanel;
    quantized_panel(call, rows_.part(first, count), number, apart, room);
  }

 private:
  const QuantizedLinear& of_;
  MadeRows rows_;
};

// Who goes where: the pairs of each expert lie together, in the order of their rows.
struct Groups {
  int64_t* begin;   // [experts + 1]: of each expert its first pair
  int64_t* active;  // [experts]: those that have one
  int64_t* row;     // [P]
  float* share;     // [P]
  int64_t num_active = 0;

  Groups(const Experts& call, Pieces& pieces)
      : begin(pieces.take<int64_t>(call.experts + 1)), active(pieces.take<int64_t>(call.experts)),
        row(pieces.take<int64_t>(call.rows * call.chosen)), share(pieces.take<float>(call.rows * call.chosen)) {}

  void sort(const Experts& call) {
    const int64_t pairs = call.rows * call.chosen;
    std::fill_n(begin, call.experts + 1, 0);
    for (int64_t pair = 0; pair < pairs; ++pair) ++begin[call.choice[pair] + 1];
    num_active = 0;
    for (int64_t expert = 0; expert < call.experts; ++expert) {
      if (begin[expert + 1]) active[num_active++] = expert;
      begin[expert + 1] += begin[expert];
    }
    // each expert's end serves as the place of its next pair, and so becomes the end in the end
    for (int64_t expert = call.experts; expert > 0; --expert) begin[expert] = begin[expert - 1];
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const int64_t at = begin[call.choice[pair] + 1]++;
      row[at] = pair / call.chosen;
      share[at] = call.shares[pair];
    }
  }
};

// Calls work(first pair, pairs) for all pairs of an expert, some at a time.
template <class Work>
void some_at_a_time(const Groups& groups, int64_t expert, Work&& work) {
  const int64_t end = groups.begin[expert + 1];
  for (int64_t first = groups.begin[expert]; first < end; first += kTogether)
    work(first, std::min(kTogether, end - first));
}

// Calls work(at, n) for all of a row: n numbers from `at` on.
template <class Work>
inline void along(int64_t width, Work&& work) {
  int64_t at = 0;
  for (; at + kLanes <= width; at += kLanes) work(at, kLanes);
  if (at < width) work(at, static_cast<int>(width - at));
}

// What goes down.
template <bool kClamped>
struct Gated {
  explicit Gated(const Experts& call)
      : alpha(splat(static_cast<float>(-call.alpha))), limit(splat(static_cast<float>(call.limit))) {}
  Vec operator()(Vec gate, Vec up) const {
    const Vec one = splat(1.0f);
    if constexpr (!kClamped) return gate / (one + exp(zero() - gate)) * up;
    gate = min(limit, gate);  // in this order what is not a number goes through
    up = min(limit, max(zero() - limit, up));
    return gate / (one + exp(alpha * gate)) * (up + one);
  }
  Vec alpha, limit;
};

// How the scratch is cut, behind what `Groups` takes.
struct Layout {
  float* sums;   // [rows][width]
  char* hidden;  // [P][inner], in the format
  char* made;    // x, then `hidden`, as they are multiplied

  Layout(const Experts& call, Pieces& pieces)
      : sums(pieces.take<float>(call.rows * call.width)),
        hidden(pieces.take<char>(call.rows * call.chosen * call.inner * size_of(call.format))), made(pieces.end()) {}
};

// Of gate and up, and of down, what takes more.
template <class Made, class Product>
int64_t made_bytes(const Experts& call, const Product* products) {
  const int64_t pairs = call.rows * call.chosen;
  return up_to(std::max(Made::bytes(products[0], pairs), Made::bytes(products[2], pairs)), 64);
}
template <class Made, class Product>
int64_t room_bytes(const Product* products) {
  return std::max(Made::room(products[0]), Made::room(products[2]));
}

template <class X, class Made, bool kClamped, class Product>
void compute(Pool& pool, const Experts& call, const Product* products, void* scratch) {
  Pieces pieces(scratch);
  Groups groups(call, pieces);
  groups.sort(call);
  const Layout layout(call, pieces);
  const int64_t pairs = call.rows * call.chosen, width = call.width, inner = call.inner;
  const X* x = static_cast<const X*>(call.x);
  X* hidden = reinterpret_cast<X*>(layout.hidden);
  char* rooms = layout.made + made_bytes<Made>(call, products);
  const int64_t room = room_bytes<Made>(products);

  const Made inputs(products[0], pairs, layout.made);
  pool.each(pairs, [&](int64_t pair, int) { inputs.make(x + groups.row[pair] * call.stride, pair); });

  const Gated<kClamped> gated(call);
  const int64_t across = panels(inner);
  pool.each(groups.num_active * across, [&](int64_t task, int thread) {
    const int64_t expert = groups.active[task / across], number = task % across, from = number * kPanel;
    const int64_t in_panel = std::min(kPanel, inner - from);
    alignas(64) float gates[kTogether * kPanel], ups[kTogether * kPanel];
    some_at_a_time(groups, expert, [&](int64_t first, int64_t count) {
      inputs.panel(products[3 * expert], first, count, number, pool.size(), rooms + thread * room, gates);
      inputs.panel(products[3 * expert + 1], first, count, number, pool.size(), rooms + thread * room, ups);
      for (int64_t row = 0; row < count; ++row) {
        X* to = hidden + (first + row) * inner + from;
        along(in_panel, [&](int64_t at, int n) {
          const Vec gate = load(gates + row * kPanel + at), up = load(ups + row * kPanel + at);
          n == kLanes ? store(to + at, gated(gate, up)) : store(to + at, gated(gate, up), n);
        });
      }
    });
  });

  const Made inners(products[2], pairs, layout.made);
  pool.each(pairs, [&](int64_t pair, int) { inners.make(hidden + pair * inner, pair); });

  pool.each(panels(width), [&](int64_t number, int thread) {
    const int64_t from = number * kPanel, in_panel = std::min(kPanel, width - from);
    alignas(64) float downs[kTogether * kPanel];
    float* sums = layout.sums + from;
    for (int64_t row = 0; row < call.rows; ++row) std::fill_n(sums + row * width, in_panel, 0.0f);
    for (int64_t at = 0; at < groups.num_active; ++at) {
      const int64_t expert = groups.active[at];
      some_at_a_time(groups, expert, [&](int64_t first, int64_t count) {
        inners.panel(products[3 * expert + 2], first, count, number, pool.size(), rooms + thread * room, downs);
        for (int64_t pair = 0; pair < count; ++pair) {
          float* to = sums + groups.row[first + pair] * width;
          const Vec share = splat(groups.share[first + pair]);
          along(in_panel, [&](int64_t k, int n) {
            const Vec down = load(downs + pair * kPanel + k);
            n == kLanes ? store(to + k, fma(share, down, load(to + k)))
                        : store(to + k, fma(share, down, load(to + k, n)), n);
          });
        }
      });
    }
    for (int64_t row = 0; row < call.rows; ++row) {
      X* to = static_cast<X*>(call.out) + row * width + from;
      along(in_panel, [&](int64_t k, int n) {
        n == kLanes ? store(to + k, load(sums + row * width + k)) : store(to + k, load(sums + row * width + k, n), n);
      });
    }
  });
}

}  // namespace

int64_t experts_scratch(int threads, const Experts& call) {
  Pieces pieces(nullptr);
  const Groups groups(call, pieces);
  const Layout layout(call, pieces);
  auto behind = [&]<class Made>(const auto* products) {
    return made_bytes<Made>(call, products) + threads * room_bytes<Made>(products);
  };
  const int64_t made = call.floats ? behind.operator()<FloatRows>(call.floats) : behind.operator()<WholeRows>(call.quantized);
  return reinterpret_cast<int64_t>(layout.made) + made;
}

void experts(Pool& pool, const Experts& call, void* scratch) {
  auto gated = [&]<bool kClamped, class X>(X) {
    if (call.quantized)
      compute<X, WholeRows, kClamped>(pool, call, call.quantized, scratch);
    else
      compute<X, FloatRows, kClamped>(pool, call, call.floats, scratch);
  };
  auto as = [&](auto x) { call.limit > 0.0 ? gated.operator()<true>(x) : gated.operator()<false>(x); };
  call.format == kFloat32 ? as(float{}) : call.format == kBfloat16 ? as(bf16{}) : as(fp16{});
}

void route(Pool& pool, const Route& call) {
  pool.each(call.rows, [&](int64_t row, int) {
    const float* logits = call.logits + row * call.stride;
    int64_t* choice = call.choice + row * call.chosen;
    float* shares = call.shares + row * call.chosen;
    // the chosen so far, in order; who is no larger than the last of them is not let in
    int64_t count = 0;
    for (int64_t expert = 0; expert < call.experts; ++expert) {
      if (count == call.chosen && !(logits[expert] > logits[choice[count - 1]])) continue;
      int64_t at = count < call.chosen ? count++ : count - 1;
      for (; at > 0 && logits[expert] > logits[choice[at - 1]]; --at) choice[at] = choice[at - 1];
      choice[at] = expert;
    }
    const Vec most = splat(logits[choice[0]]);
    auto power = [&](Vec logit) { return exp(logit - most); };
    float total = 0.0f, of_chosen = 0.0f;
    Vec powers = zero();
    int64_t at = 0;
    for (; at + kLanes <= call.experts; at += kLanes) powers = powers + power(load(logits + at));
    total = sum(powers);
    float rest[kLanes];
    if (at < call.experts) {
      store(rest, power(load(logits + at, static_cast<int>(call.experts - at))));
      for (int64_t lane = 0; at + lane < call.experts; ++lane) total += rest[lane];
    }
    for (int64_t rank = 0; rank < call.chosen; ++rank) {
      store(rest, power(splat(logits[choice[rank]])));
      shares[rank] = rest[0];
      of_chosen += rest[0];
    }
    const float by = call.over_chosen ? of_chosen : total;
    for (int64_t rank = 0; rank < call.chosen; ++rank) shares[rank] = std::isnan(total) ? NAN : shares[rank] / by;
  });
}

}  // namespace quire
