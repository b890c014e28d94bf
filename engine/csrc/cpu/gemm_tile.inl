// The matrix kernel on AMX tiles: 2 x 2 accumulator tiles (32 rows by 32 columns), of which the lower two are left out
// where there are at most 16 rows. A step multiplies tiles of A (16 rows by 32 deep) with tiles of B (1 KiB of a
// panel). Included by linear.inl.
//
// The tile shape never changes: missing rows are zero rows of the packed A, missing depth is zeros in both.
// A is packed, [row tiles][steps][16][32], because tile loads from strided rows cost a third of the speed.

struct TileKernel {
  static constexpr int kRows = 32, kPanels = 2;
  static constexpr int kTile = 16, kDepth = 32, kBytes = 1024;
  static constexpr int64_t kAhead = 2048;          // bytes; 1 to 32 KiB differ by 7%
  static constexpr int64_t kLargeBytes = 1 << 20;  // of output

  struct Session {  // the thread's tile registers are configured while it lives
    Session() {
      struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
      } config;
      for (int i = 0; i < 8; i++) config.row_bytes[i] = 64, config.rows[i] = kTile;
      _tile_loadconfig(&config);
    }
    ~Session() {
      _tile_release();
      _mm_sfence();  // stores past the caches are seen before the end of the parallel region is
    }
  };

  static int64_t packed_row_bytes(int64_t depth) { return round_up(depth, kDepth) * 2; }

  static void pack(const Gemm<bf16>& g, int64_t row, int height, char* to) {
    if (g.a_transposed) return pack_transposed(g, row, height, to);
    for (int r = 0; r < height; r += kTile, to += kTile * packed_row_bytes(g.depth))
      pack_tile(to, g.a + (row + r) * g.a_stride, g.a_stride, std::min(kTile, height - r), g.depth);
  }

  static void pack_tile(char* to, const bf16* from, int64_t stride, int height, int64_t depth) {
    int64_t whole = depth / kDepth, rest = depth % kDepth;
    for (int64_t s = 0; s < whole; s++, to += kBytes, from += kDepth) {
      for (int r = 0; r < height; r++) std::memcpy(to + r * 64, from + r * stride, 64);
      if (height < kTile) std::memset(to + height * 64, 0, (kTile - height) * 64);
    }
    if (!rest) return;
    std::memset(to, 0, kBytes);
    for (int r = 0; r < height; r++) std::memcpy(to + r * 64, from + r * stride, rest * 2);
  }

  // Both row tiles at once: they share cache lines of the transpose.
  static void pack_transposed(const Gemm<bf16>& g, int64_t row, int height, char* to) {
    const int64_t tile_bytes = kTile * packed_row_bytes(g.depth), stride = g.a_stride;
    const int heights[2] = {std::min(kTile, height), std::max(0, height - kTile)};
    const bf16* from = g.a + row;
    for (int64_t k = 0; k < g.depth; k += kDepth, to += kBytes, from += kDepth * stride) {
      u32x16 pairs[2][16];
      int64_t left = g.depth - k;
      for (int i = 0; i < 16; i++) {
        const bf16 *even = from + 2 * i * stride, *odd = even + stride;
        if (left > 2 * kDepth) {  // rows lie too far apart for the processor to foresee the next
          _mm_prefetch(even + kDepth * stride, _MM_HINT_T0);
          _mm_prefetch(odd + kDepth * stride, _MM_HINT_T0);
        }
        for (int t = 0; t < 2; t++)
          pairs[t][i] = interleave(load_bits(even + t * kTile, 2 * i < left ? heights[t] : 0),
                                   load_bits(odd + t * kTile, 2 * i + 1 < left ? heights[t] : 0));
      }
      for (int t = 0; t < 2 && heights[t] > 0; t++) {
        transpose(pairs[t]);
        std::memcpy(to + t * tile_bytes, pairs[t], kBytes);
      }
    }
  }

  // C at [row, row + height) x panels [panel, panel + width); `a` are the packed rows. The first block of rows to use
  // these panels fetches them from memory.
  static void block(const Gemm<bf16>& g, const char* a, int64_t row, int height, int64_t panel, int width,
                    bool first) {
    int64_t whole = g.depth / kDepth, rest = g.depth % kDepth;
    bool low = height > kTile;
    int second = width - 1;  // a panel alone is computed twice, and kept once
    const char* a1 = a + (low ? kTile * packed_row_bytes(g.depth) : 0);
    const char* b0 = reinterpret_cast<const char*>(g.panels + panel * g.panel_stride);
    const char* b1 = b0 + second * g.panel_stride * 2;
    // Two tiles' worth, used for the upper and then for the lower rows: with twice as much, and all rows at once, the
    // accumulators fall out of the first-level cache between blocks (measured: 1.3 times slower).
    alignas(64) float sums[kTile * kPanels * kLanes];
    const int64_t line = width * 64;
    float* sums1 = sums + second * kLanes;

    if (g.start) {
      begin_block(g, row, std::min(height, kTile), panel, width, sums);
      fence();
      _tile_loadd(0, sums, line);
      _tile_loadd(1, sums1, line);
      if (low) {
        fence();
        begin_block(g, row + kTile, height - kTile, panel, width, sums);
        fence();
        _tile_loadd(2, sums, line);
        _tile_loadd(3, sums1, line);
      }
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    fence();
    if (low && !first) {
      // Both operands come from the second-level cache and do not fit in the first: the streaming hint keeps them from
      // evicting the accumulators' memory (measured: 1.2 times faster).
      for (int64_t s = 0; s < whole * kBytes; s += kBytes) {
        _tile_stream_loadd(6, b0 + s, 64);
        _tile_stream_loadd(7, b1 + s, 64);
        _tile_stream_loadd(4, a + s, 64);
        _tile_stream_loadd(5, a1 + s, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    } else {
      for (int64_t s = 0; s < whole * kBytes; s += kBytes) {
        if (first)
          for (int i = 0; i < kBytes; i += 64) {
            _mm_prefetch(b0 + s + kAhead + i, _MM_HINT_T0);
            _mm_prefetch(b1 + s + kAhead + i, _MM_HINT_T0);
          }
        _tile_loadd(6, b0 + s, 64);
        _tile_loadd(7, b1 + s, 64);
        _tile_loadd(4, a + s, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (low) {
          _tile_loadd(5, a1 + s, 64);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
    }
    if (rest) {
      alignas(64) char padded[2][kBytes] = {};
      std::memcpy(padded[0], b0 + whole * kBytes, ceil_div(rest, 2) * 64);
      std::memcpy(padded[1], b1 + whole * kBytes, ceil_div(rest, 2) * 64);
      fence();
      _tile_loadd(6, padded[0], 64);
      _tile_loadd(7, padded[1], 64);
      _tile_loadd(4, a + whole * kBytes, 64);
      _tile_loadd(5, a1 + whole * kBytes, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(1, sums1, line);  // where both panels are one, the second copy goes first
    _tile_stored(0, sums, line);
    end(g, row, std::min(height, kTile), panel, width, sums);
    if (!low) return;
    _tile_stored(3, sums1, line);
    _tile_stored(2, sums, line);
    end(g, row + kTile, height - kTile, panel, width, sums);
  }

  static void end(const Gemm<bf16>& g, int64_t row, int height, int64_t panel, int width, const float* sums) {
    if (g.out_dtype != kBFloat16 || width < 2 || (panel + 2) * kLanes > g.columns)
      return end_block(g, row, height, panel, width, sums);
    bf16* to = static_cast<bf16*>(g.out) + row * g.out_stride + panel * kLanes;
    const int64_t stride = g.out_stride;
    // A large output leaves the second-level cache anyway; lines written past it need not be read first.
    const bool whole_lines = (reinterpret_cast<uintptr_t>(to) | stride * 2) % 64 == 0;
    const bool past_caches = whole_lines && g.rows * stride * 2 >= kLargeBytes;
    auto write = [&](auto&& add) {
      for (int r = 0; r < height; r++) {
        f32x16 left = add(load(sums + r * 2 * kLanes), 0), right = add(load(sums + (r * 2 + 1) * kLanes), 1);
        __m512i line = (__m512i)_mm512_cvtne2ps_pbh((__m512)right, (__m512)left);
        if (past_caches)
          _mm512_stream_si512(reinterpret_cast<__m512i*>(to + r * stride), line);
        else
          _mm512_storeu_si512(to + r * stride, line);
      }
    };
    if (!g.bias) return write([](f32x16 v, int) { return v; });
    f32x16 bias[2];
    for (int p = 0; p < 2; p++) bias[p] = load_bias(g.bias, g.bias_dtype, (panel + p) * kLanes, kLanes);
    write([&](f32x16 v, int p) { return v + bias[p]; });
  }

  // The compiler does not know that tile loads read memory, nor when.
  SIMD_INLINE void fence() { asm volatile("" ::: "memory"); }
};
