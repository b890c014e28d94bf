// Packing a dense matrix into panels of 16 rows and back (the layout is drawn in docs/architecture.md).
#include <algorithm>


#include "ops.h"
#include "parallel.h"

namespace caduceus {
namespace {

constexpr int64_t kPanel = 16;

// Where element (row, 0) of the matrix lies, and how far its pairs along the width are apart.
template <class T>
T* row_start(T* storage, int64_t width, int64_t row) {
  constexpr int pair = kPair<T>;
  return storage + (row / kPanel) * round_up(width, pair) * kPanel + (row % kPanel) * pair;
}

template <class T, class Source>
void pack(T* storage, int64_t width, int64_t row, int64_t rows, const Source* source, int64_t stride) {
  constexpr int pair = kPair<T>;
  parallel_for(rows, kPanel, [=](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      T* to = row_start(storage, width, row + r);
      const Source* from = source + r * stride;
      int64_t k = 0;
      for (; k + pair <= width; k += pair, to += kPanel * pair)
        for (int j = 0; j < pair; j++) to[j] = from_float<T>(to_float(from[k + j]));
      if (k < width) to[0] = from_float<T>(to_float(from[k])), to[pair - 1] = from_float<T>(0.f);
    }
  });
}

template <class T, class Target>
void unpack(const T* storage, int64_t width, int64_t row, int64_t rows, Target* target, int64_t stride) {
  constexpr int pair = kPair<T>;
  parallel_for(rows, kPanel, [=](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      const T* from = row_start(storage, width, row + r);
      Target* to = target + r * stride;
      for (int64_t k = 0; k < width; k++)
        to[k] = from_float<Target>(to_float(from[k / pair * pair * kPanel + k % pair]));
    }
  });
}

// f(storage as T*, other as U*) with the element types of the two dtypes.
template <class F>
void with_types(DType a, DType b, F&& f) {
  if (a == kFloat32 && b == kFloat32) f(float{}, float{});
  if (a == kFloat32 && b == kBFloat16) f(float{}, bf16{});
  if (a == kBFloat16 && b == kFloat32) f(bf16{}, float{});
  if (a == kBFloat16 && b == kBFloat16) f(bf16{}, bf16{});
}

}  // namespace

void pack_rows(void* storage, DType dtype, int64_t width, int64_t row, int64_t rows, const void* source,
               DType source_dtype, int64_t source_stride) {
  with_types(dtype, source_dtype, [&](auto t, auto s) {
    pack(static_cast<decltype(t)*>(storage), width, row, rows, static_cast<const decltype(s)*>(source), source_stride);
  });
}

void unpack_rows(const void* storage, DType dtype, int64_t width, int64_t row, int64_t rows, void* target,
                 DType target_dtype, int64_t target_stride) {
  with_types(dtype, target_dtype, [&](auto t, auto s) {
    unpack(static_cast<const decltype(t)*>(storage), width, row, rows, static_cast<decltype(s)*>(target),
           target_stride);
  });
}

}  // namespace caduceus
