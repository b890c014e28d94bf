// The matrix kernel on AMX tiles: 2 x 2 accumulator tiles (32 rows by 32 columns), or 1 x 4 where there are at most 16
// rows. A step multiplies a tile of A (16 rows by 32 deep) with a tile of B (1 KiB of a panel). Included by linear.inl.
//
// The tile shape never changes: missing rows are zero rows of the packed A, missing depth is zeros in both.

struct TileKernel {
  static constexpr int kRows = 32, kPanels = 4, kSums = kRows * kPanels * kLanes;
  static constexpr int kTile = 16, kDepth = 32, kBytes = 1024;

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
    ~Session() { _tile_release(); }
  };

  struct Rows {
    const char* tiles;  // [ceil(rows / 16)][steps][16][32]
    int64_t steps;
  };

  static Rows prepare(const Gemm<bf16>& g, int64_t row, int64_t rows) {
    int64_t steps = ceil_div(g.depth, kDepth);
    char* tiles = static_cast<char*>(scratch(Scratch::kRows, ceil_div(rows, kTile) * steps * kBytes));
    for (int64_t r = 0; r < rows; r += kTile) {
      int height = int(std::min<int64_t>(kTile, rows - r));
      char* to = tiles + r / kTile * steps * kBytes;
      if (g.a_transposed)
        pack_tile_transposed(to, g.a + row + r, g.a_stride, height, g.depth);
      else
        pack_tile(to, g.a + (row + r) * g.a_stride, g.a_stride, height, g.depth);
    }
    return {tiles, steps};
  }

  static void pack_tile(char* to, const bf16* from, int64_t stride, int height, int64_t depth) {
    int64_t whole = depth / kDepth, rest = depth % kDepth;
    for (int r = 0; r < kTile; r++) {
      char* at = to + r * 64;
      if (r >= height) {
        for (int64_t s = 0; s < whole + (rest > 0); s++) std::memset(at + s * kBytes, 0, 64);
        continue;
      }
      const bf16* row = from + r * stride;
      for (int64_t s = 0; s < whole; s++) std::memcpy(at + s * kBytes, row + s * kDepth, 64);
      if (rest) {
        std::memset(at + whole * kBytes, 0, 64);
        std::memcpy(at + whole * kBytes, row + whole * kDepth, rest * 2);
      }
    }
  }

  static void pack_tile_transposed(char* to, const bf16* from, int64_t stride, int height, int64_t depth) {
    for (int64_t k = 0; k < depth; k += kDepth, to += kBytes) {
      u32x16 pairs[16];
      for (int i = 0; i < 16; i++) {
        const bf16* row = from + (k + 2 * i) * stride;
        pairs[i] = interleave(load_bits(row, k + 2 * i < depth ? height : 0),
                              load_bits(row + stride, k + 2 * i + 1 < depth ? height : 0));
      }
      transpose(pairs);
      std::memcpy(to, pairs, kBytes);
    }
  }

  // The last, partly filled tile of B, padded with zeros.
  static const char* last_tile(const char* panel, int64_t whole, int64_t rest, char* padded) {
    std::memset(padded, 0, kBytes);
    std::memcpy(padded, panel + whole * kBytes, ceil_div(rest, 2) * 64);
    return padded;
  }

  static void run(const Rows& a, int64_t row, int height, const bf16* b, int64_t panel_stride, int width,
                  int64_t depth, float* sums, bool resume) {
    int64_t whole = depth / kDepth, rest = depth % kDepth;
    const char* tiles = a.tiles + row / kTile * a.steps * kBytes;
    const char* panel = reinterpret_cast<const char*>(b);
    int64_t bytes = panel_stride * 2, line = width * 64;
    alignas(64) char padded[4][kBytes];
    if (rest)
      for (int p = 0; p < width; p++) last_tile(panel + p * bytes, whole, rest, padded[p]);
    asm volatile("" ::: "memory");  // the compiler does not know that tile loads read memory
    for (int p = 0; p < width; p += 2) {
      int second = p + 1 < width ? 1 : 0;  // an odd panel out is computed twice; the copy is not kept
      const char* b0 = panel + p * bytes;
      const char* b1 = b0 + second * bytes;
      float* c0 = sums + p * kLanes;
      float* c1 = c0 + second * kLanes;
      if (height > kTile) {
        const char* a1 = tiles + a.steps * kBytes;
        float *c2 = c0 + kTile * line / 4, *c3 = c1 + kTile * line / 4;
        if (resume) {
          _tile_loadd(0, c0, line);
          _tile_loadd(1, c1, line);
          _tile_loadd(2, c2, line);
          _tile_loadd(3, c3, line);
        } else {
          _tile_zero(0);
          _tile_zero(1);
          _tile_zero(2);
          _tile_zero(3);
        }
        for (int64_t s = 0; s < a.steps; s++) {
          bool tail = s == whole;
          _tile_loadd(6, tail ? padded[p] : b0 + s * kBytes, 64);
          _tile_loadd(7, tail ? padded[p + second] : b1 + s * kBytes, 64);
          _tile_loadd(4, tiles + s * kBytes, 64);
          _tile_loadd(5, a1 + s * kBytes, 64);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(1, c1, line);
        _tile_stored(0, c0, line);
        _tile_stored(3, c3, line);
        _tile_stored(2, c2, line);
      } else {
        if (resume) {
          _tile_loadd(0, c0, line);
          _tile_loadd(1, c1, line);
        } else {
          _tile_zero(0);
          _tile_zero(1);
        }
        for (int64_t s = 0; s < a.steps; s++) {
          bool tail = s == whole;
          _tile_loadd(4, tiles + s * kBytes, 64);
          _tile_loadd(6, tail ? padded[p] : b0 + s * kBytes, 64);
          _tile_loadd(7, tail ? padded[p + second] : b1 + s * kBytes, 64);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
        }
        _tile_stored(1, c1, line);
        _tile_stored(0, c0, line);
      }
    }
  }
};
