#include "pool.h"

#include <immintrin.h>

namespace quire {

namespace {
constexpr uint64_t kSpin = 100000;  // ticks of the time stamp counter: some tens of microseconds

// Whether it is worth while to look again at once.
class Patience {
 public:
  bool spin() {
    _mm_pause();
    return __rdtsc() - began_ < kSpin;
  }

 private:
  uint64_t began_ = __rdtsc();
};
}

Pool::Pool(int threads) {
  try {
    for (int thread = 1; thread < threads; ++thread) workers_.emplace_back([this, thread] { serve(thread); });
  } catch (...) {
    end();
    throw;
  }
}

Pool::~Pool() { end(); }

void Pool::end() {
  over_.store(true);
  round_.fetch_add(1);
  round_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void Pool::run(int64_t count, Call call, void* work) {
  call_ = call;
  work_ = work;
  count_ = count;
  next_.store(0, std::memory_order_relaxed);
  inside_.store(0, std::memory_order_release);
  round_.fetch_add(1, std::memory_order_release);
  round_.notify_all();
  take(0);
  // nobody comes in any more, and nothing that a worker looks at changes before it has left
  inside_.fetch_add(kClosed, std::memory_order_acq_rel);
  for (Patience patience; inside_.load(std::memory_order_acquire) != kClosed;) {
    if (!patience.spin()) std::this_thread::yield();
  }
}

// A worker that comes late may find a later round's work here; that is as good.
bool Pool::enter() {
  int64_t inside = inside_.load(std::memory_order_relaxed);
  while (inside >= 0) {
    if (inside_.compare_exchange_weak(inside, inside + 1, std::memory_order_acquire, std::memory_order_relaxed)) {
      return true;
    }
  }
  return false;
}

void Pool::take(int thread) {
  for (;;) {
    int64_t number = next_.fetch_add(1, std::memory_order_relaxed);
    if (number >= count_) return;
    call_(work_, number, thread);
  }
}

void Pool::serve(int thread) {
  uint32_t seen = 0;
  for (;;) {
    uint32_t now = round_.load(std::memory_order_acquire);
    for (Patience patience; now == seen; now = round_.load(std::memory_order_acquire)) {
      if (!patience.spin()) round_.wait(seen, std::memory_order_acquire);
    }
    seen = now;
    if (over_.load()) return;
    if (!enter()) continue;
    take(thread);
    inside_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace quire
