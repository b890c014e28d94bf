#include "parallel.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace caduceus {
namespace {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Waiting threads spin this long before they sleep: a decode step is hundreds of short parallel regions, and a wake-up
// through the kernel costs far more than a spin.
constexpr auto kSpin = std::chrono::microseconds(150);

thread_local bool inside = false;

class Pool {
 public:
  explicit Pool(int threads) {
    for (int i = 1; i < threads; i++) workers_.emplace_back([this] { work(); });
  }
  ~Pool() {
    {
      std::lock_guard lock(mutex_);
      stop_ = true;
      epoch_.fetch_add(1);
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }
  int threads() const { return int(workers_.size()) + 1; }

  void run(int64_t items, int64_t grain, void* context, Body body) {
    items_ = items, grain_ = grain, context_ = context, body_ = body;
    next_.store(0, std::memory_order_relaxed);
    busy_.store(int(workers_.size()), std::memory_order_relaxed);
    {
      std::lock_guard lock(mutex_);
      epoch_.fetch_add(1, std::memory_order_release);
    }
    if (sleepers_.load() > 0) wake_.notify_all();
    drain();
    auto spin_until = std::chrono::steady_clock::now() + kSpin;
    while (busy_.load(std::memory_order_acquire) > 0) {
      if (std::chrono::steady_clock::now() < spin_until)
        for (int i = 0; i < 8; i++) pause();
      else
        sched_yield();
    }
  }

 private:
  void drain() {
    inside = true;
    for (;;) {
      int64_t begin = next_.fetch_add(grain_, std::memory_order_relaxed);
      if (begin >= items_) break;
      body_(context_, begin, std::min(items_, begin + grain_));
    }
    inside = false;
  }

  void work() {
    uint64_t seen = 0;
    for (;;) {
      auto spin_until = std::chrono::steady_clock::now() + kSpin;
      while (epoch_.load(std::memory_order_acquire) == seen && std::chrono::steady_clock::now() < spin_until)
        for (int i = 0; i < 8; i++) pause();
      if (epoch_.load(std::memory_order_acquire) == seen) {
        std::unique_lock lock(mutex_);
        sleepers_.fetch_add(1);
        wake_.wait(lock, [&] { return epoch_.load() != seen; });
        sleepers_.fetch_sub(1);
      }
      seen = epoch_.load(std::memory_order_acquire);
      if (stop_) return;
      drain();
      busy_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> epoch_{0};
  std::atomic<int> busy_{0}, sleepers_{0};
  std::atomic<int64_t> next_{0};
  int64_t items_ = 0, grain_ = 1;
  void* context_ = nullptr;
  Body body_ = nullptr;
  bool stop_ = false;
};

int usable_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1u, std::thread::hardware_concurrency());
}

std::mutex pool_mutex;  // one parallel region at a time; a second caller computes alone
Pool* pool = nullptr;
int wanted_threads = 0;

void forget_pool() {  // in a forked child the worker threads do not exist
  pool = nullptr;
  new (&pool_mutex) std::mutex;
}

}  // namespace

int num_threads() {
  if (wanted_threads == 0) wanted_threads = usable_cores();
  return wanted_threads;
}

void set_num_threads(int threads) {
  std::lock_guard lock(pool_mutex);
  wanted_threads = std::max(1, threads);
  delete pool;
  pool = nullptr;
}

void parallel_run(int64_t items, int64_t grain, void* context, Body body) {
  if (items <= 0) return;
  grain = std::max<int64_t>(1, grain);
  if (inside || items <= grain || num_threads() == 1 || !pool_mutex.try_lock()) {
    for (int64_t begin = 0; begin < items; begin += grain) body(context, begin, std::min(items, begin + grain));
    return;
  }
  std::lock_guard lock(pool_mutex, std::adopt_lock);
  if (!pool) {
    static std::once_flag once;
    std::call_once(once, [] { pthread_atfork(nullptr, nullptr, forget_pool); });
    pool = new Pool(num_threads());
  }
  pool->run(items, grain, context, body);
}

}  // namespace caduceus
