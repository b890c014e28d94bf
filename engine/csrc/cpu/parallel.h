// One pool of threads for every kernel. Work is split into items whose results do not depend on who computes them.
#pragma once
#include <cstdint>
#include <type_traits>

namespace caduceus {

using Body = void (*)(void* context, int64_t begin, int64_t end);

int num_threads();
void set_num_threads(int threads);  // 1 or more, the caller's own thread included

// Calls body(context, begin, end) over [0, items) in chunks of `grain`; returns when all are done. A call from inside a
// body runs on the spot.
void parallel_run(int64_t items, int64_t grain, void* context, Body body);

template <class F>
void parallel_for(int64_t items, int64_t grain, F&& f) {  // f(begin, end)
  parallel_run(items, grain, &f, [](void* context, int64_t begin, int64_t end) {
    (*static_cast<std::remove_reference_t<F>*>(context))(begin, end);
  });
}

}  // namespace caduceus
