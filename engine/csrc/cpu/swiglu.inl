// SwiGLU's elementwise half, silu(gate) * up, gate and up side by side in one row.
#include "row.h"

SIMD_INLINE f32x16 sigmoid(f32x16 x) { return 1.f / (1.f + exp(-x)); }

template <class T>
static void swiglu_rows(const T* gate_up, T* out, int64_t rows, int64_t width) {
  parallel_for(rows, rows_per_item(width), [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      const T *gate = gate_up + row * 2 * width, *up = gate + width;
      for (int64_t k = 0; k < width; k += kLanes) {
        int lanes = lanes_at(k, width);
        f32x16 g = load_lanes(gate + k, lanes);
        f32x16 silu = rounded<T>(g / (1.f + exp(-g)));
        store_lanes(out + row * width + k, silu * load_lanes(up + k, lanes), lanes);
      }
    }
  });
}

template <class T>
static void swiglu_backward_rows(const T* dy, const T* gate_up, T* d_gate_up, int64_t rows, int64_t width) {
  parallel_for(rows, rows_per_item(width), [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      const T *gate = gate_up + row * 2 * width, *up = gate + width;
      T *d_gate = d_gate_up + row * 2 * width, *d_up = d_gate + width;
      for (int64_t k = 0; k < width; k += kLanes) {
        int lanes = lanes_at(k, width);
        f32x16 g = load_lanes(gate + k, lanes), d = load_lanes(dy + row * width + k, lanes);
        f32x16 s = sigmoid(g);
        store_lanes(d_up + k, d * rounded<T>(g * s), lanes);
        store_lanes(d_gate + k, d * load_lanes(up + k, lanes) * s * fma(g, 1.f - s, splat(1.f)), lanes);
      }
    }
  });
}
