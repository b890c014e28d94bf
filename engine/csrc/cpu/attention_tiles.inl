// The one product attention is made of: rows of A times packed panels of B, and what goes between two of them.
//
// A panel is 16 columns of B with the reduction dimension in groups of kPair (2 for bf16, 1 for fp32):
// [depth / kPair][16][kPair]. C[r][16 p + j] = sum over c, k of A[r][c * depth + k] * panel(p, c)[k][j], summed in that
// order for every element, in one chain: how many rows or panels are computed together changes no bit. The bf16 sums
// are those of the instruction (tdpbf16ps, vdpbf16ps, or two fmas), one of them per instruction set.

template <class T>
SIMD_INLINE int padded_dim(int dim) {  // the depth of Q K^T: whole instructions of the widest kind
  return int(round_up(dim, 16 * kPair<T>));
}

#if ISA_LEVEL == 4
struct alignas(64) TileShape {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
// Tiles are configured while an object lives. Operands of tile loads are made by ordinary stores that the compiler must
// not move over them: hence the barriers.
struct Matrix {
  Matrix() {
    static const TileShape shape;
    _tile_loadconfig(&shape);
  }
  ~Matrix() { _tile_release(); }
};
#define TILE_BARRIER asm volatile("" ::: "memory")

template <class Panel>
SIMD_INLINE void multiply(const bf16* a, int64_t lda, int rows, int depth, int chunks, int panels, Panel&& panel,
                          float* c, int64_t ldc, bool add) {
  TILE_BARRIER;
  const int64_t a_stride = lda * 2, c_stride = ldc * 4;
  int r = 0;
  for (; r + 16 < rows; r += 32) {  // two tiles of rows by two panels
    const bf16* a0 = a + r * lda;
    const bf16* a1 = a0 + 16 * lda;
    float* c0 = c + r * ldc;
    float* c1 = c0 + 16 * ldc;
    int p = 0;
    for (; p + 2 <= panels; p += 2) {
      if (add) {
        _tile_loadd(0, c0 + 16 * p, c_stride);
        _tile_loadd(1, c0 + 16 * p + 16, c_stride);
        _tile_loadd(2, c1 + 16 * p, c_stride);
        _tile_loadd(3, c1 + 16 * p + 16, c_stride);
      } else {
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
      }
      for (int chunk = 0; chunk < chunks; chunk++) {
        const bf16 *b0 = panel(p, chunk), *b1 = panel(p + 1, chunk);
        for (int k = 0; k < depth; k += 32) {
          _tile_loadd(4, a0 + chunk * depth + k, a_stride);
          _tile_loadd(6, b0 + k * 16, 64);
          _tile_loadd(7, b1 + k * 16, 64);
          _tile_loadd(5, a1 + chunk * depth + k, a_stride);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
      _tile_stored(0, c0 + 16 * p, c_stride);
      _tile_stored(1, c0 + 16 * p + 16, c_stride);
      _tile_stored(2, c1 + 16 * p, c_stride);
      _tile_stored(3, c1 + 16 * p + 16, c_stride);
    }
    if (p < panels) {
      if (add) {
        _tile_loadd(0, c0 + 16 * p, c_stride);
        _tile_loadd(2, c1 + 16 * p, c_stride);
      } else {
        _tile_zero(0); _tile_zero(2);
      }
      for (int chunk = 0; chunk < chunks; chunk++) {
        const bf16* b0 = panel(p, chunk);
        for (int k = 0; k < depth; k += 32) {
          _tile_loadd(4, a0 + chunk * depth + k, a_stride);
          _tile_loadd(6, b0 + k * 16, 64);
          _tile_loadd(5, a1 + chunk * depth + k, a_stride);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(2, 5, 6);
        }
      }
      _tile_stored(0, c0 + 16 * p, c_stride);
      _tile_stored(2, c1 + 16 * p, c_stride);
    }
  }
  if (r < rows) {  // one tile of rows by four panels
    const bf16* a0 = a + r * lda;
    float* c0 = c + r * ldc;
    int p = 0;
    for (; p + 4 <= panels; p += 4) {
      if (add) {
        _tile_loadd(0, c0 + 16 * p, c_stride);
        _tile_loadd(1, c0 + 16 * p + 16, c_stride);
        _tile_loadd(2, c0 + 16 * p + 32, c_stride);
        _tile_loadd(3, c0 + 16 * p + 48, c_stride);
      } else {
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
      }
      for (int chunk = 0; chunk < chunks; chunk++) {
        const bf16 *b0 = panel(p, chunk), *b1 = panel(p + 1, chunk);
        const bf16 *b2 = panel(p + 2, chunk), *b3 = panel(p + 3, chunk);
        for (int k = 0; k < depth; k += 32) {
          _tile_loadd(4, a0 + chunk * depth + k, a_stride);
          _tile_loadd(6, b0 + k * 16, 64);
          _tile_dpbf16ps(0, 4, 6);
          _tile_loadd(7, b1 + k * 16, 64);
          _tile_dpbf16ps(1, 4, 7);
          _tile_loadd(6, b2 + k * 16, 64);
          _tile_dpbf16ps(2, 4, 6);
          _tile_loadd(7, b3 + k * 16, 64);
          _tile_dpbf16ps(3, 4, 7);
        }
      }
      _tile_stored(0, c0 + 16 * p, c_stride);
      _tile_stored(1, c0 + 16 * p + 16, c_stride);
      _tile_stored(2, c0 + 16 * p + 32, c_stride);
      _tile_stored(3, c0 + 16 * p + 48, c_stride);
    }
    for (; p < panels; p++) {
      if (add)
        _tile_loadd(0, c0 + 16 * p, c_stride);
      else
        _tile_zero(0);
      for (int chunk = 0; chunk < chunks; chunk++) {
        const bf16* b0 = panel(p, chunk);
        for (int k = 0; k < depth; k += 32) {
          _tile_loadd(4, a0 + chunk * depth + k, a_stride);
          _tile_loadd(6, b0 + k * 16, 64);
          _tile_dpbf16ps(0, 4, 6);
        }
      }
      _tile_stored(0, c0 + 16 * p, c_stride);
    }
  }
  TILE_BARRIER;
}
#else
struct Matrix {};
#endif

// Sixteen running sums. AVX2 has registers of eight, and GCC spills vectors wider than its registers.
#if ISA_LEVEL == 1
struct Sums {
  __m256 low, high;
};
SIMD_INLINE Sums load_sums(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
SIMD_INLINE Sums no_sums() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
SIMD_INLINE void store(float* p, Sums v) { _mm256_storeu_ps(p, v.low), _mm256_storeu_ps(p + 8, v.high); }
SIMD_INLINE Sums add_products(float a, Sums b, Sums c) {
  const __m256 all = _mm256_set1_ps(a);
  return {_mm256_fmadd_ps(all, b.low, c.low), _mm256_fmadd_ps(all, b.high, c.high)};
}
#else
typedef f32x16 Sums;
SIMD_INLINE Sums load_sums(const float* p) { return load(p); }
SIMD_INLINE Sums no_sums() { return splat(0.f); }
SIMD_INLINE Sums add_products(float a, Sums b, Sums c) { return fma(splat(a), b, c); }
#endif

// One step of kPair products: a broadcast from A, a vector of 16 columns.
SIMD_INLINE Sums panel_vector(const float* b) { return load_sums(b); }
SIMD_INLINE Sums step(const float* a, Sums b, Sums c) { return add_products(*a, b, c); }
#if ISA_LEVEL >= 3
SIMD_INLINE i32x16 panel_vector(const bf16* b) {
  i32x16 v;
  std::memcpy(&v, b, 64);
  return v;
}
SIMD_INLINE Sums step(const bf16* a, i32x16 b, Sums c) {
  int32_t pair;
  std::memcpy(&pair, a, 4);
  return (f32x16)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)b);
}
#else
struct Pairs {
  Sums even, odd;
};
SIMD_INLINE Pairs panel_vector(const bf16* b) {
#if ISA_LEVEL == 1
  const __m256i low = _mm256_loadu_si256((const __m256i*)b), high = _mm256_loadu_si256((const __m256i*)(b + 16));
  const __m256i mask = _mm256_set1_epi32(int(0xffff0000u));
  return {{(__m256)_mm256_slli_epi32(low, 16), (__m256)_mm256_slli_epi32(high, 16)},
          {(__m256)_mm256_and_si256(low, mask), (__m256)_mm256_and_si256(high, mask)}};
#else
  u32x16 v;
  std::memcpy(&v, b, 64);
  return {(f32x16)(v << 16), (f32x16)(v & 0xffff0000u)};
#endif
}
SIMD_INLINE Sums step(const bf16* a, Pairs b, Sums c) {
  return add_products(to_float(a[1]), b.odd, add_products(to_float(a[0]), b.even, c));
}
#endif

template <int R, int C, class T, class Panel>
SIMD_INLINE void multiply_block(const T* a, int64_t lda, int depth, int chunks, int first, Panel&& panel, float* c,
                                int64_t ldc, bool add) {
  Sums sum[R][C];
  for (int r = 0; r < R; r++)
    for (int j = 0; j < C; j++) sum[r][j] = add ? load_sums(c + r * ldc + 16 * j) : no_sums();
  for (int chunk = 0; chunk < chunks; chunk++) {
    const T* b[C];
    for (int j = 0; j < C; j++) b[j] = panel(first + j, chunk);
    const T* at = a + chunk * depth;
    for (int k = 0; k < depth; k += kPair<T>) {
      decltype(panel_vector(b[0])) v[C];
      for (int j = 0; j < C; j++) v[j] = panel_vector(b[j] + k * 16);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int j = 0; j < C; j++) sum[r][j] = step(at + r * lda + k, v[j], sum[r][j]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int j = 0; j < C; j++) store(c + r * ldc + 16 * j, sum[r][j]);
}

template <int R, class T, class Panel>
SIMD_INLINE void multiply_rows(const T* a, int64_t lda, int depth, int chunks, int panels, Panel&& panel, float* c,
                               int64_t ldc, bool add) {
  constexpr int C = ISA_LEVEL >= 2 ? 4 : 1;
  int p = 0;
  for (; p + C <= panels; p += C) multiply_block<R, C>(a, lda, depth, chunks, p, panel, c + 16 * p, ldc, add);
  for (; p < panels; p++) multiply_block<R, 1>(a, lda, depth, chunks, p, panel, c + 16 * p, ldc, add);
}

template <class T, class Panel>
SIMD_INLINE void multiply(const T* a, int64_t lda, int rows, int depth, int chunks, int panels, Panel&& panel, float* c,
                          int64_t ldc, bool add) {
  int r = 0;
  for (; r + 4 <= rows; r += 4)
    multiply_rows<4>(a + r * lda, lda, depth, chunks, panels, panel, c + r * ldc, ldc, add);
  if (rows - r == 3) multiply_rows<3>(a + r * lda, lda, depth, chunks, panels, panel, c + r * ldc, ldc, add);
  if (rows - r == 2) multiply_rows<2>(a + r * lda, lda, depth, chunks, panels, panel, c + r * ldc, ldc, add);
  if (rows - r == 1) multiply_rows<1>(a + r * lda, lda, depth, chunks, panels, panel, c + r * ldc, ldc, add);
}

// 2^t for t <= 0, about 1 ulp: t = n + r, |r| <= 1/2, a minimax polynomial of degree 5 in r whose constant is exactly 1
// (so 2^0 = 1: folding a tile that holds nothing for a row leaves the row as it was). Below -125 it is exactly 0, -inf
// included; NaN stays NaN.
SIMD_INLINE f32x16 exp2_of_nonpositive(f32x16 t) {
  const f32x16 magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer, found in the low bits
  f32x16 shifted = t + magic;
  f32x16 r = t - (shifted - magic);
  f32x16 p = splat(0x1.5bba14p-10f);
  p = fma(p, r, splat(0x1.3cea88p-7f));
  p = fma(p, r, splat(0x1.c6b752p-5f));
  p = fma(p, r, splat(0x1.ebf9bcp-3f));
  p = fma(p, r, splat(0x1.62e42ap-1f));
  p = fma(p, r, splat(1.f));
  u32x16 exponent, bits;
  std::memcpy(&exponent, &shifted, 64), std::memcpy(&bits, &p, 64);
  bits += exponent << 23;
  std::memcpy(&p, &bits, 64);
  return t < splat(-125.f) ? splat(0.f) : p;
}

SIMD_INLINE float maximum(f32x16 v) {
#if ISA_LEVEL >= 2
  v = max(v, __builtin_shuffle(v, i32x16{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7}));
  v = max(v, __builtin_shuffle(v, i32x16{4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11}));
  v = max(v, __builtin_shuffle(v, i32x16{2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13}));
  v = max(v, __builtin_shuffle(v, i32x16{1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14}));
  return v[0];
#else
  return reduce_max(v);
#endif
}

// Probabilities and their gradients in the model's type.
SIMD_INLINE void store_rounded(float* p, f32x16 v) { store(p, v); }
SIMD_INLINE void store_rounded(bf16* p, f32x16 v) {
#if ISA_LEVEL >= 3
  __m256bh h = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(p, &h, 32);
#else
  store(p, v);
#endif
}

SIMD_INLINE i32x16 lane_numbers() { return i32x16{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }
