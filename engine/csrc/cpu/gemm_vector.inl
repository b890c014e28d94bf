// The matrix kernel on vector registers: a block of up to kRows rows by kPanels panels of accumulators; each step
// broadcasts one lane of A per row against one vector of B per 16 columns. Included by linear.inl.
//
// A lane is a float, except where vdpbf16ps multiplies pairs of bf16: there it is the pair. Elsewhere bf16 is widened,
// which is exact, and a pair is two multiply-adds, the even element first.

#if ISA_LEVEL >= 2
typedef __m512 Native;
SIMD_INLINE Native native_fma(Native a, Native b, Native c) { return _mm512_fmadd_ps(a, b, c); }
#elif ISA_LEVEL == 1
typedef __m256 Native;
SIMD_INLINE Native native_fma(Native a, Native b, Native c) { return _mm256_fmadd_ps(a, b, c); }
#else
typedef float Native __attribute__((vector_size(16)));
SIMD_INLINE Native native_fma(Native a, Native b, Native c) { return a * b + c; }
#endif
typedef uint32_t NativeBits __attribute__((vector_size(sizeof(Native))));

SIMD_INLINE Native native_load(const float* p) {
  Native v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
SIMD_INLINE void native_store(float* p, Native v) { std::memcpy(p, &v, sizeof v); }
SIMD_INLINE Native native_splat(float x) { return Native{} + x; }
SIMD_INLINE Native native_even(Native v) { return (Native)((NativeBits)v << 16); }
SIMD_INLINE Native native_odd(Native v) { return (Native)((NativeBits)v & 0xffff0000u); }

template <class T>
struct VectorKernel {
  static constexpr bool kDot = ISA_LEVEL >= 3 && sizeof(T) == 2;   // vdpbf16ps takes the pair
  static constexpr int kPairs = sizeof(T) == 2 && !kDot ? 2 : 1;  // lanes of A per 32-bit lane of B
  static constexpr int kWidth = int(sizeof(Native) / 4), kPerPanel = kLanes / kWidth;
  // 24 accumulators of 32 registers, 12 of 16 or, where nothing is fused and B needs temporaries, 8.
  static constexpr int kRows = ISA_LEVEL >= 2 ? 12 : ISA_LEVEL == 1 ? (sizeof(T) == 2 ? 5 : 6) : 2;
  static constexpr int kPanels = ISA_LEVEL >= 2 ? 2 : 1;
  static constexpr int kSums = kRows * kPanels * kLanes;
  using Lane = std::conditional_t<kDot, uint32_t, float>;

  struct Session {};
  struct Rows {
    const Lane* lanes;
    int64_t stride;
  };

  static Rows prepare(const Gemm<T>& g, int64_t row, int64_t rows) {
    if constexpr (sizeof(T) == 4) {
      if (!g.a_transposed) return {g.a + row * g.a_stride, g.a_stride};
    } else if constexpr (kDot) {
      if (!g.a_transposed && g.depth % 2 == 0 && g.a_stride % 2 == 0)
        return {reinterpret_cast<const uint32_t*>(g.a + row * g.a_stride), g.a_stride / 2};
    }
    int64_t stride = kDot ? ceil_div(g.depth, 2) : round_up(g.depth, kPairs);
    Lane* lanes = static_cast<Lane*>(scratch(Scratch::kRows, size_t(rows) * stride * sizeof(Lane)));
    if (g.a_transposed) {
      pack_transposed(lanes, stride, g.a + row, g.a_stride, rows, g.depth);
    } else {
      for (int64_t r = 0; r < rows; r++) pack_row(lanes + r * stride, stride, g.a + (row + r) * g.a_stride, g.depth);
    }
    return {lanes, stride};
  }

  static void pack_row(Lane* to, int64_t lanes, const T* from, int64_t depth) {
    if constexpr (kDot) {
      to[lanes - 1] = 0;
      std::memcpy(to, from, depth * sizeof(T));
    } else {
      int64_t k = 0;
      for (; k + kLanes <= depth; k += kLanes) store(to + k, load(from + k));
      for (; k < depth; k++) to[k] = to_float(from[k]);
      for (; k < lanes; k++) to[k] = 0.f;
    }
  }

  static void run(const Rows& a, int64_t row, int height, const T* b, int64_t panel_stride, int width, int64_t depth,
                  float* sums, bool resume) {
    const Lane* lanes = a.lanes + row * a.stride;
    auto call = [&](auto height_, auto width_) {
      block<height_(), width_()>(lanes, a.stride, reinterpret_cast<const float*>(b), panel_stride / kPair<T>,
                                 ceil_div(depth, kPair<T>), sums, resume);
    };
    with_height<kRows>(height, [&](auto h) {
      if (kPanels == 2 && width == 1)
        call(h, std::integral_constant<int, 1>{});
      else
        call(h, std::integral_constant<int, kPanels>{});
    });
  }

  template <int N, class F>
  SIMD_INLINE void with_height(int height, F&& f) {
    if constexpr (N > 0) {
      if (height == N)
        f(std::integral_constant<int, N>{});
      else
        with_height<N - 1>(height, f);
    }
  }

  SIMD_INLINE Native multiply(const Lane* a, Native b, Native sum) {
#if ISA_LEVEL >= 3
    if constexpr (kDot)
      return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(int(*a)), (__m512bh)b);
    else
#endif
    if constexpr (kPairs == 2)
      return native_fma(native_splat(a[1]), native_odd(b), native_fma(native_splat(a[0]), native_even(b), sum));
    else
      return native_fma(native_splat(float(*a)), b, sum);
  }

  template <int H, int W>
  static void block(const Lane* a, int64_t a_stride, const float* b, int64_t panel_stride, int64_t steps, float* sums,
                    bool resume) {
    constexpr int V = W * kPerPanel;
    Native sum[H][V];
    for (int h = 0; h < H; h++)
      for (int v = 0; v < V; v++) sum[h][v] = resume ? native_load(sums + (h * V + v) * kWidth) : native_splat(0.f);
    for (int64_t s = 0; s < steps; s++) {
      Native column[V];
      for (int v = 0; v < V; v++)
        column[v] = native_load(b + (v / kPerPanel) * panel_stride + s * kLanes + (v % kPerPanel) * kWidth);
      for (int h = 0; h < H; h++)
        for (int v = 0; v < V; v++) sum[h][v] = multiply(a + h * a_stride + s * kPairs, column[v], sum[h][v]);
    }
    for (int h = 0; h < H; h++)
      for (int v = 0; v < V; v++) native_store(sums + (h * V + v) * kWidth, sum[h][v]);
  }
};
