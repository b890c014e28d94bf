// AdamW in one pass over memory: gradient, master weight and both moments are read once, and the compute weight is
// written from the new master while it is still in the cache, packed or dense.
#include "row.h"

struct AdamWFactors {
  float beta2, rest1, rest2, eps, decay, grad_scale, step_size, root_correction;
};
SIMD_INLINE AdamWFactors factors_of(const AdamWSettings& s) {
  double correction1 = 1.0 - std::pow(s.beta1, double(s.step)), correction2 = 1.0 - std::pow(s.beta2, double(s.step));
  return {float(s.beta2), float(1.0 - s.beta1), float(1.0 - s.beta2), float(s.eps),
          float(1.0 - s.learning_rate * s.weight_decay), float(s.grad_scale),
          float(s.learning_rate / correction1), float(1.0 / std::sqrt(correction2))};
}

// Updates n elements in place and leaves the new master weights in `out` too.
static void adamw_run(const AdamWFactors& a, const float* grad, float* master, float* exp_avg, float* exp_avg_sq,
                      float* out, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; i++) {
    float g = grad[i] * a.grad_scale;
    float m = exp_avg[i] + a.rest1 * (g - exp_avg[i]);
    float v = a.beta2 * exp_avg_sq[i] + a.rest2 * g * g;
    float w = master[i] * a.decay - a.step_size * m / (std::sqrt(v) * a.root_correction + a.eps);
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    master[i] = w;
    out[i] = w;
  }
}

constexpr int64_t kTileColumns = 256;  // of a 16-row panel: the tile's new weights, 16 KiB, stay in the first cache

template <class T>
static void adamw_packed(const AdamWSettings& settings, const float* grad, float* master, float* exp_avg,
                         float* exp_avg_sq, T* weight, int64_t rows, int64_t width) {
  const AdamWFactors a = factors_of(settings);
  constexpr int pair = kPair<T>;
  int64_t tiles = ceil_div(width, kTileColumns), panel_elements = round_up(width, pair) * 16;
  parallel_for(ceil_div(rows, 16) * tiles, 4, [=](int64_t begin, int64_t end) {
    alignas(64) float tile[16][kTileColumns];
    for (int64_t item = begin; item < end; item++) {
      int64_t panel = item / tiles, from = item % tiles * kTileColumns;
      int64_t columns = std::min(kTileColumns, width - from);
      int lanes = int(std::min<int64_t>(16, rows - panel * 16));
      for (int r = 0; r < 16; r++) {
        if (r >= lanes) {
          std::memset(tile[r], 0, sizeof tile[r]);
          continue;
        }
        int64_t at = (panel * 16 + r) * width + from;
        adamw_run(a, grad + at, master + at, exp_avg + at, exp_avg_sq + at, tile[r], columns);
        if (columns < kTileColumns) tile[r][columns] = 0.f;  // the missing half of a last pair
      }
      T* to = weight + panel * panel_elements + from * 16;
      for (int64_t k = 0; k < columns; k += pair)
        for (int r = 0; r < 16; r++)
          for (int j = 0; j < pair; j++) to[k * 16 + r * pair + j] = from_float<T>(tile[r][k + j]);
    }
  });
}

template <class T>
static void adamw_dense(const AdamWSettings& settings, const float* grad, float* master, float* exp_avg,
                        float* exp_avg_sq, T* weight, int64_t count) {
  const AdamWFactors a = factors_of(settings);
  constexpr int64_t block = 4096;
  parallel_for(ceil_div(count, block), 4, [=](int64_t begin, int64_t end) {
    alignas(64) float fresh[block];
    for (int64_t at = begin * block; at < std::min(count, end * block); at += block) {
      int64_t n = std::min(block, count - at);
      adamw_run(a, grad + at, master + at, exp_avg + at, exp_avg_sq + at, fresh, n);
      for (int64_t k = 0; k < n; k += kLanes) {
        int lanes = lanes_at(k, n);
        store_lanes(weight + at + k, load(fresh + k), lanes);
      }
    }
  });
}

// Sum of squares in chunks of 16,384 elements, 16 double lanes each; the chunks fold in order.
constexpr int64_t kNormChunk = 16384;

static double squared_norm_of(const float* values, int64_t count) {
  typedef double f64x16 __attribute__((vector_size(128)));
  int64_t chunks = ceil_div(count, kNormChunk);
  std::unique_ptr<double[]> sums(new double[size_t(chunks)]);
  double* partial = sums.get();
  parallel_for(chunks, 1, [=](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; chunk++) {
      int64_t n = std::min(kNormChunk, count - chunk * kNormChunk);
      f64x16 sum = {};
      for (int64_t k = 0; k < n; k += kLanes) {
        f64x16 v = __builtin_convertvector(load_lanes(values + chunk * kNormChunk + k, lanes_at(k, n)), f64x16);
        sum = sum + v * v;
      }
      double folded = 0.0;
      for (int i = 0; i < kLanes; i++) folded += sum[i];
      partial[chunk] = folded;
    }
  });
  double total = 0.0;
  for (int64_t chunk = 0; chunk < chunks; chunk++) total += partial[chunk];
  return total;
}
