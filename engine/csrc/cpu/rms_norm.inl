// Root mean square normalisation, one row at a time. Sums run in 16 lanes over the columns and fold in one order.
#include "row.h"

// x (+ delta, rounded and kept as `sum`) -> out. `delta`, `sum` and `rstd` may be null.
template <class T>
static void rms_norm_rows(const T* x, const T* delta, const T* weight, T* sum, T* out, float* rstd, int64_t rows,
                          int64_t width, float eps) {
  parallel_for(rows, rows_per_item(width), [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      const T* source = x + row * width;
      f32x16 squares = {};
      if (delta) {
        const T *a = source, *b = delta + row * width;
        T* to = sum + row * width;
        for (int64_t k = 0; k < width; k += kLanes) {
          int lanes = lanes_at(k, width);
          f32x16 v = rounded<T>(load_lanes(a + k, lanes) + load_lanes(b + k, lanes));
          store_lanes(to + k, v, lanes);
          squares = fma(v, v, squares);
        }
        source = to;
      } else {
        for (int64_t k = 0; k < width; k += kLanes) {
          f32x16 v = load_lanes(source + k, lanes_at(k, width));
          squares = fma(v, v, squares);
        }
      }
      float scale = 1.f / std::sqrt(reduce_add(squares) / float(width) + eps);
      if (rstd) rstd[row] = scale;
      T* to = out + row * width;
      for (int64_t k = 0; k < width; k += kLanes) {
        int lanes = lanes_at(k, width);
        f32x16 normed = rounded<T>(load_lanes(source + k, lanes) * scale);
        store_lanes(to + k, normed * load_lanes(weight + k, lanes), lanes);
      }
    }
  });
}

// dx = rstd * (dn - x * rstd^2 * mean(dn * x)) + d_sum with dn = dy * weight; weight_grad += sum over rows of
// dy * round(x * rstd). Rows are summed in chunks of kGradientRows and the chunks in order, whoever computes them.
constexpr int64_t kGradientRows = 64;

template <class T>
static void rms_norm_backward_rows(const T* dy, const T* d_sum, const T* x, const T* weight, const float* rstd, T* dx,
                                   float* weight_grad, int64_t rows, int64_t width) {
  int64_t chunks = ceil_div(rows, kGradientRows);
  std::unique_ptr<float[]> partial(new float[chunks * width]);
  float* sums = partial.get();
  parallel_for(chunks, ceil_div(rows_per_item(width), kGradientRows), [=](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; chunk++) {
      float* dw = sums + chunk * width;
      std::memset(dw, 0, size_t(width) * sizeof(float));
      for (int64_t row = chunk * kGradientRows; row < std::min(rows, (chunk + 1) * kGradientRows); row++) {
        const T *g = dy + row * width, *v = x + row * width;
        f32x16 dot = {};
        for (int64_t k = 0; k < width; k += kLanes) {
          int lanes = lanes_at(k, width);
          dot = fma(load_lanes(g + k, lanes) * load_lanes(weight + k, lanes), load_lanes(v + k, lanes), dot);
        }
        float scale = rstd[row];
        float mean = scale * scale * (reduce_add(dot) / float(width));
        for (int64_t k = 0; k < width; k += kLanes) {
          int lanes = lanes_at(k, width);
          f32x16 gk = load_lanes(g + k, lanes), vk = load_lanes(v + k, lanes);
          f32x16 d = (gk * load_lanes(weight + k, lanes) - vk * mean) * scale;
          if (d_sum) d = d + load_lanes(d_sum + row * width + k, lanes);
          store_lanes(dx + row * width + k, d, lanes);
          store_lanes(dw + k, fma(gk, rounded<T>(vk * scale), load_lanes(dw + k, lanes)), lanes);
        }
      }
    }
  });
  parallel_for(ceil_div(width, kLanes), std::max<int64_t>(1, kGrainElements / kLanes / std::max<int64_t>(1, chunks)),
               [=](int64_t begin, int64_t end) {
                 for (int64_t k = begin * kLanes; k < std::min(width, end * kLanes); k += kLanes) {
                   int lanes = lanes_at(k, width);
                   f32x16 all = {};
                   for (int64_t chunk = 0; chunk < chunks; chunk++)
                     all = all + load_lanes(sums + chunk * width + k, lanes);
                   store_lanes(weight_grad + k, load_lanes(weight_grad + k, lanes) + all, lanes);
                 }
               });
}
