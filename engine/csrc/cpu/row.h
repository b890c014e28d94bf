// What row-wise kernels share, in the namespace of the instruction set being compiled (no include guard, like simd.h).

constexpr int64_t kGrainElements = 16384;  // below this, waking a thread costs more than the work

SIMD_INLINE int64_t rows_per_item(int64_t width) { return std::max<int64_t>(1, kGrainElements / width); }

// `lanes` is 16 everywhere but in the last columns of a row whose width is no multiple of 16.
SIMD_INLINE int lanes_at(int64_t column, int64_t width) { return int(std::min<int64_t>(kLanes, width - column)); }
template <class T>
SIMD_INLINE f32x16 load_lanes(const T* p, int lanes, float fill = 0.f) {
  return __builtin_expect(lanes == kLanes, 1) ? load(p) : load_n(p, lanes, fill);
}
template <class T>
SIMD_INLINE void store_lanes(T* p, f32x16 v, int lanes) {
  if (__builtin_expect(lanes == kLanes, 1))
    store(p, v);
  else
    store_n(p, v, lanes);
}

// What is left of v once it has been stored as T.
template <class T>
SIMD_INLINE f32x16 rounded(f32x16 v) {
  if constexpr (sizeof(T) == 2)
    return round_bf16(v);
  else
    return v;
}
