// The matrix kernel on vector registers: a block of up to kRows rows by kPanels panels of accumulators; each step
// broadcasts one lane of A per row against one vector of B per 16 columns. Included by linear.inl.
//
// A lane is a float, except where vdpbf16ps multiplies pairs of bf16: there it is the pair. Elsewhere bf16 is widened,
// which is exact, and a pair is two multiply-adds, the even element first.

#if ISA_LEVEL >= 2
typedef __m512 Native;
SIMD_INLINE Native native_splat(float x) { return _mm512_set1_ps(x); }
SIMD_INLINE Native native_fma(Native a, Native b, Native c) { return _mm512_fmadd_ps(a, b, c); }
#elif ISA_LEVEL == 1
typedef __m256 Native;
SIMD_INLINE Native native_splat(float x) { return _mm256_set1_ps(x); }
SIMD_INLINE Native native_fma(Native a, Native b, Native c) { return _mm256_fmadd_ps(a, b, c); }
#else
typedef float Native __attribute__((vector_size(16)));
SIMD_INLINE Native native_splat(float x) { return Native{x, x, x, x}; }
SIMD_INLINE Native native_fma(Native a, Native b, Native c) { return a * b + c; }
#endif
typedef uint32_t NativeBits __attribute__((vector_size(sizeof(Native))));

SIMD_INLINE Native native_load(const float* p) {
  Native v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
SIMD_INLINE void native_store(float* p, Native v) { std::memcpy(p, &v, sizeof v); }
SIMD_INLINE Native native_even(Native v) { return (Native)((NativeBits)v << 16); }
SIMD_INLINE Native native_odd(Native v) { return (Native)((NativeBits)v & 0xffff0000u); }

template <class T>
struct VectorKernel {
  static constexpr bool kDot = ISA_LEVEL >= 3 && sizeof(T) == 2;  // vdpbf16ps takes the pair
  static constexpr int kGroup = kDot ? 2 : 1;                     // elements of A in a lane
  static constexpr int kSplit = kPair<T> / kGroup;                // lanes of A per 32-bit lane of B
  static constexpr int kWidth = int(sizeof(Native) / 4), kPerPanel = kLanes / kWidth;
  // 24 accumulators of 32 registers, 12 of 16 or, where B needs temporaries, 8 to 10.
  static constexpr int kRows = ISA_LEVEL >= 2 ? 12 : ISA_LEVEL == 1 ? (sizeof(T) == 2 ? 5 : 6) : 2;
  static constexpr int kPanels = ISA_LEVEL >= 2 ? 2 : 1;
  using Lane = std::conditional_t<kDot, uint32_t, float>;

  struct Session {};

  static int64_t num_lanes(int64_t depth) { return ceil_div(depth, kPair<T>) * kSplit; }
  static int64_t packed_row_bytes(int64_t depth) { return num_lanes(depth) * 4; }

  // Lanes [k, k + 16) of one row of A, or of 16 rows' lane k of its transpose: elements past n or the depth are zero.
  static u32x16 row_lanes(const T* row, int64_t lane, int64_t depth) {
    int left = int(std::clamp<int64_t>(depth - lane * kGroup, 0, kLanes * kGroup));
    if constexpr (kDot) {
      u32x16 v;
      u16x16 halves[2] = {load_bits(row + lane * 2, std::min(left, kLanes)),
                          load_bits(row + lane * 2 + kLanes, std::max(left - kLanes, 0))};
      std::memcpy(&v, halves, 64);
      return v;
    } else {
      return widen_bits(load_bits(row + lane, left));
    }
  }
  static u32x16 column_lanes(const T* at, int64_t stride, int64_t lane, int64_t depth, int n) {
    if constexpr (kDot)
      return interleave(load_bits(at + lane * 2 * stride, n),
                        load_bits(at + (lane * 2 + 1) * stride, lane * 2 + 1 < depth ? n : 0));
    else
      return widen_bits(load_bits(at + lane * stride, lane < depth ? n : 0));
  }

  static void pack(const Gemm<T>& g, int64_t row, int height, char* packed) {
    Lane* to = reinterpret_cast<Lane*>(packed);
    int64_t lanes = num_lanes(g.depth);
    if (g.a_transposed) {
      for (int64_t l = 0; l < lanes; l++)
        store_bits(to + l * height, column_lanes(g.a + row, g.a_stride, l, g.depth, height), height);
      return;
    }
    for (int64_t l = 0; l < lanes; l += kLanes) {
      int n = int(std::min<int64_t>(kLanes, lanes - l));
      u32x16 block[16] = {};
      for (int r = 0; r < height; r++) block[r] = row_lanes(g.a + (row + r) * g.a_stride, l, g.depth);
      if (height == 1) {
        store_bits(to + l, block[0], n);
        continue;
      }
      transpose(block);
      for (int i = 0; i < n; i++) store_bits(to + (l + i) * height, block[i], height);
    }
  }

  // C at [row, row + height) x panels [panel, panel + width); `a` are the packed rows. The first block of rows to use
  // these panels fetches them from memory.
  static void block(const Gemm<T>& g, const char* a, int64_t row, int height, int64_t panel, int width,
                    bool first) {
    alignas(64) float sums[kRows * kPanels * kLanes];
    if (g.start) begin_block(g, row, height, panel, width, sums);
    const float* b = reinterpret_cast<const float*>(g.panels + panel * g.panel_stride);
    int64_t b_stride = g.panel_stride / kPair<T>, steps = ceil_div(g.depth, kPair<T>);
    with_height<kRows>(height, [&](auto h) {
      if (kPanels == 2 && width == 1)
        sum<h(), 1>(reinterpret_cast<const Lane*>(a), b, b_stride, steps, sums, g.start, first);
      else
        sum<h(), kPanels>(reinterpret_cast<const Lane*>(a), b, b_stride, steps, sums, g.start, first);
    });
    end_block(g, row, height, panel, width, sums);
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

  SIMD_INLINE Native multiply(const Lane* a, int next, Native b, Native sum) {
#if ISA_LEVEL >= 3
    if constexpr (kDot)
      return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(int(*a)), (__m512bh)b);
    else
#endif
    if constexpr (kSplit == 2)
      return native_fma(native_splat(a[next]), native_odd(b), native_fma(native_splat(a[0]), native_even(b), sum));
    else
      return native_fma(native_splat(float(*a)), b, sum);
  }

  template <int H, int W>
  static void sum(const Lane* a, const float* b, int64_t b_stride, int64_t steps, float* sums, bool resume,
                  bool first) {
    constexpr int V = W * kPerPanel;
    Native sum[H][V];
    for (int h = 0; h < H; h++)
      for (int v = 0; v < V; v++) sum[h][v] = resume ? native_load(sums + (h * V + v) * kWidth) : native_splat(0.f);
    for (int64_t s = 0; s < steps; s++, a += kSplit * H, b += kLanes) {
      if (first)
        for (int w = 0; w < W; w++) __builtin_prefetch(b + w * b_stride + kAhead);
      Native column[V];
      for (int v = 0; v < V; v++)
        column[v] = native_load(b + (v / kPerPanel) * b_stride + (v % kPerPanel) * kWidth);
      for (int h = 0; h < H; h++)
        for (int v = 0; v < V; v++) sum[h][v] = multiply(a + h, H, column[v], sum[h][v]);
    }
    for (int h = 0; h < H; h++)
      for (int v = 0; v < V; v++) native_store(sums + (h * V + v) * kWidth, sum[h][v]);
  }

  static constexpr int64_t kAhead = 1024;  // floats
};
