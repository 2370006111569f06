// A few threads that wait for the next piece of work by spinning for a moment, then by sleeping.
//
// A step is a long row of short operations, so what counts is the time from the end of one to the start of the next:
// one or two microseconds while everybody spins. Who has spun for some tens of microseconds lets others have the
// processor, for a pool may not be alone on those it was given. Work is handed out in order of its number, one piece
// at a time; an operation ends when all its pieces are done. A thread that has no processor at the moment, because
// another engine computes there, is not waited for unless it lost it in the middle of a piece: the others do its share,
// and it finds the door closed.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace quire {

class Pool {
 public:
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls work(number, thread) for every number below `count`; returns when all are done. The caller works, too.
  template <class Work>
  void each(int64_t count, Work&& work) {
    if (count <= 0) return;
    if (count == 1 || workers_.empty()) {
      for (int64_t number = 0; number < count; ++number) work(number, 0);
      return;
    }
    run(count, [](void* it, int64_t number, int thread) { (*static_cast<std::remove_reference_t<Work>*>(it))(number, thread); },
        const_cast<void*>(static_cast<const void*>(&work)));
  }

 private:
  using Call = void (*)(void*, int64_t, int);
  static constexpr int64_t kClosed = INT64_MIN / 2;
  void run(int64_t count, Call call, void* work);
  void serve(int thread);
  bool enter();
  void take(int thread);
  void end();

  std::vector<std::thread> workers_;
  Call call_ = nullptr;
  void* work_ = nullptr;
  int64_t count_ = 0;
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<uint32_t> round_{0};
  // The workers that are at the work, while it is open to them; below zero when it is closed.
  alignas(64) std::atomic<int64_t> inside_{kClosed};
  std::atomic<bool> over_{false};
};

}  // namespace quire
