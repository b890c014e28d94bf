// One head of one token: RMSNorm of queries and keys (optional), then rotary position embedding (arXiv 2104.09864) with
// the halves convention: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin). All of it in fp32; the caller rounds once.

constexpr int kMaxHeadDim = 256;

// 1 / rms of a head, its mean of squares folded in fixed lanes.
SIMD_INLINE float inverse_rms(const float* x, int dim, float eps) {
  f32x16 squares = splat(0.f);
  for (int d = 0; d < dim; d += 16) squares = fma(load(x + d), load(x + d), squares);
  return 1.f / std::sqrt(reduce_add(squares) / float(dim) + eps);
}

// x and out hold dim floats and may be the same; cos_sin is the position's row of the table, [dim/2] cos | [dim/2] sin.
SIMD_INLINE void rotate(const float* x, const float* cos_sin, int dim, float* out) {
  const int half = dim / 2;
  for (int i = 0; i < half; i += 16) {
    const int n = std::min(16, half - i);
    if (n == 16) {
      f32x16 x1 = load(x + i), x2 = load(x + half + i), c = load(cos_sin + i), s = load(cos_sin + half + i);
      store(out + i, fma(x1, c, -(x2 * s)));
      store(out + half + i, fma(x2, c, x1 * s));
    } else {
      f32x16 x1 = load_n(x + i, n), x2 = load_n(x + half + i, n);
      f32x16 c = load_n(cos_sin + i, n), s = load_n(cos_sin + half + i, n);
      store_n(out + i, fma(x1, c, -(x2 * s)), n);
      store_n(out + half + i, fma(x2, c, x1 * s), n);
    }
  }
}

// The gradient of rotate: the rotation back.
SIMD_INLINE void rotate_back(const float* x, const float* cos_sin, int dim, float* out) {
  const int half = dim / 2;
  for (int i = 0; i < half; i += 16) {
    const int n = std::min(16, half - i);
    f32x16 x1 = load_n(x + i, n), x2 = load_n(x + half + i, n);
    f32x16 c = load_n(cos_sin + i, n), s = load_n(cos_sin + half + i, n);
    store_n(out + i, fma(x1, c, x2 * s), n);
    store_n(out + half + i, fma(x2, c, -(x1 * s)), n);
  }
}

template <class T>
SIMD_INLINE void norm_and_rotate(const T* x, const T* norm, float eps, const float* cos_sin, int dim, T* out) {
  alignas(64) float head[kMaxHeadDim];
  for (int d = 0; d < dim; d += 16) store(head + d, load(x + d));
  if (norm) {
    const f32x16 scale = splat(inverse_rms(head, dim, eps));
    for (int d = 0; d < dim; d += 16) store(head + d, load(head + d) * scale * load(norm + d));
  }
  rotate(head, cos_sin, dim, head);
  for (int d = 0; d < dim; d += 16) store(out + d, load(head + d));
}
