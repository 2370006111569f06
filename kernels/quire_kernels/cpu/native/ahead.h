// Memory asked for before it is read: a weight comes once through the caches in every step, and the processor's own
// guesses end with the page.
//
// A panel is swept by rows in passes of a few. If one pass does, it asks some kilobytes ahead of itself, and from the
// panel's end on for the one that its thread probably takes next. If there are more, all but the first find the panel
// in the second cache, so memory would stand idle; they all ask for their share of the next panel instead.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace quire {

constexpr int64_t kFar = 8192;     // bytes, to the second cache
constexpr int64_t kNear = 1024;    // to the first
constexpr int64_t kBeside = 4096;  // for what is read beside a panel, a small part of it

// `rows` in passes of at most `most`, as even as can be.
struct Passes {
  int64_t count, each, longer;
  Passes(int64_t rows, int64_t most) : count((rows + most - 1) / most) {
    each = count ? rows / count : 0;
    longer = count ? rows % count : 0;
  }
  int64_t rows(int64_t pass) const { return each + (pass < longer); }
};

class Ahead {
 public:
  // For pass `pass` of `passes` over the part of a panel that begins at `from`: `size` bytes, of which each step takes
  // some of the next `step`. The same part of the next panel is at `next`, or null.
  Ahead(const void* from, int64_t size, const void* next, int64_t step, int64_t pass, int64_t passes)
      : next_(static_cast<const char*>(next ? next : from)), step_(step / passes) {
    if (passes == 1 && size > kFar) {
      at_ = static_cast<const char*>(from) + kFar;
      end_ = static_cast<const char*>(from) + size;
    } else {
      at_ = next_ + size / passes * pass;
      end_ = nullptr;
    }
  }

  // Before a step that reads `Lines` lines at `from`.
  template <int Lines>
  void operator()(const void* from) {
#pragma GCC unroll 8
    for (int line = 0; line < Lines; ++line) {
      _mm_prefetch(static_cast<const char*>(from) + kNear + 64 * line, _MM_HINT_T0);
      _mm_prefetch(at_ + 64 * line, _MM_HINT_T1);
    }
    at_ += step_;
    if (at_ == end_) at_ = next_;
  }

  // Before `Bytes` that lie in a row of their own are read at `from`.
  template <int Bytes>
  static void beside(const void* from) {
#pragma GCC unroll 8
    for (int line = 0; line < Bytes; line += 64)
      _mm_prefetch(static_cast<const char*>(from) + kBeside + line, _MM_HINT_T1);
  }

 private:
  const char *at_, *end_, *next_;
  int64_t step_;
};

// The same by bytes: each sweep over a panel asks for its share of the next one evenly and for a line but once, and
// leaves what is in the second cache to the processor. Where the products of a step take few cycles, as those of whole
// numbers do, lines that are asked for again, or for the first cache, keep the weights waiting.
class Share {
 public:
  // For sweep `number` of `count` over a panel of `size` bytes at `from`, of which each turn takes `turn`. `alone`: there
  // is one pass. The next panel is at `next`, or null.
  Share(const void* from, int64_t size, const void* next, int64_t turn, bool alone, int64_t number, int64_t count)
      : next_(static_cast<const char*>(next)), bytes_(turn) {
    if (alone && number == 0 && size > kFar) {
      at_ = static_cast<const char*>(from) + kFar;
      end_ = static_cast<const char*>(from) + size;
    } else {
      at_ = next_ ? next_ + size * number / count : nullptr;
      bytes_ = next_ ? (turn + count - 1) / count : 0;
      end_ = nullptr;
    }
    until_ = at_;
  }

  // Before a turn.
  void operator()() {
    until_ += bytes_;
    for (; at_ < until_; at_ += 64) _mm_prefetch(at_, _MM_HINT_T1);
    if (at_ == end_) at_ = until_ = next_ ? next_ : end_;
  }

  // Before `Bytes` are read at `from` for a few rows, which memory keeps waiting and nothing else.
  template <int Bytes>
  static void near(const void* from) {
#pragma GCC unroll 8
    for (int line = 0; line < Bytes; line += 64)
      _mm_prefetch(static_cast<const char*>(from) + kNear + line, _MM_HINT_T0);
  }

 private:
  const char *at_, *until_, *end_, *next_;
  int64_t bytes_;
};

}  // namespace quire
