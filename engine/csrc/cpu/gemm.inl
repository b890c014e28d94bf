// C = A B on packed panels, for every use the engine has of a matrix product. Included by linear.inl.
//
//   A  [rows, depth]      row-major (activations), or given as its transpose [depth, rows] (the weight gradient)
//   B  [depth, columns]   in panels of 16 columns: fp32 [columns/16][depth][16], bf16 [columns/16][depth/2][16][2]
//   C  [rows, columns]    row-major; begins at `start` or zero, gets the bias, is rounded once
//
// Bits. Element (r, c) is one chain of multiply-adds along the depth, from 0 to the end, in the kernel's own step (one
// element, a pair, or a tile of 32). Which rows share a register block, where blocks begin and who computes them does
// not enter: a partly filled block computes the same chain on fewer rows or beside zero rows. Depth may be cut anywhere
// at a multiple of 32 if the partial sums are kept in fp32, because that is what the registers hold too.

template <class T>
struct Gemm {
  const T* a;
  int64_t a_stride;
  bool a_transposed;
  int64_t rows, columns, depth;
  const T* panels;
  int64_t panel_stride;
  const float* start;  // nullptr: C begins at zero
  int64_t start_stride;
  const void* bias;  // nullptr: none
  DType bias_dtype;
  void* out;
  DType out_dtype;
  int64_t out_stride;
};

SIMD_INLINE f32x16 load_bias(const void* bias, DType dtype, int64_t column, int n) {
  if (dtype == kFloat32) {
    const float* p = static_cast<const float*>(bias) + column;
    return n == kLanes ? load(p) : load_n(p, n);
  }
  const bf16* p = static_cast<const bf16*>(bias) + column;
  return n == kLanes ? load(p) : load_n(p, n);
}

// Copies a block of C into the accumulators, [rows][panels * 16]; columns past the end are zero.
template <class T>
void begin_block(const Gemm<T>& g, int64_t row, int rows, int64_t panel, int panels, float* sums) {
  for (int p = 0; p < panels; p++) {
    int64_t column = (panel + p) * kLanes;
    int n = int(std::min<int64_t>(kLanes, g.columns - column));
    for (int r = 0; r < rows; r++) {
      const float* from = g.start + (row + r) * g.start_stride + column;
      store(sums + (r * panels + p) * kLanes, n == kLanes ? load(from) : load_n(from, n));
    }
  }
}

template <class Out>
SIMD_INLINE void write_block(Out* out, int64_t stride, int rows, int panels, int64_t columns_left, const float* sums,
                             const f32x16* bias) {
  for (int p = 0; p < panels; p++) {
    int n = int(std::min<int64_t>(kLanes, columns_left - p * kLanes));
    Out* to = out + p * kLanes;
    for (int r = 0; r < rows; r++, to += stride) {
      f32x16 v = load(sums + (r * panels + p) * kLanes);
      if (bias) v = v + bias[p];
      if (n == kLanes)
        store(to, v);
      else
        store_n(to, v, n);
    }
  }
}

// Adds the bias and rounds a block of accumulators into C.
template <class T>
void end_block(const Gemm<T>& g, int64_t row, int rows, int64_t panel, int panels, const float* sums) {
  int64_t column = panel * kLanes;
  f32x16 bias[8];
  if (g.bias)
    for (int p = 0; p < panels; p++) {
      int64_t c = column + p * kLanes;
      bias[p] = load_bias(g.bias, g.bias_dtype, c, int(std::min<int64_t>(kLanes, g.columns - c)));
    }
  int64_t at = row * g.out_stride + column;
  if (g.out_dtype == kFloat32)
    write_block(static_cast<float*>(g.out) + at, g.out_stride, rows, panels, g.columns - column, sums,
                g.bias ? bias : nullptr);
  else
    write_block(static_cast<bf16*>(g.out) + at, g.out_stride, rows, panels, g.columns - column, sums,
                g.bias ? bias : nullptr);
}

// Work is cut into items: a block of rows, whose packed A stays in the second-level cache, by a range of panels, which
// stream past it. Where there are row blocks enough for the threads, each packs its own; else A is packed first, by all
// threads, and the panels are divided too.
constexpr int64_t kBlockBytes = 800 << 10;     // of packed A
constexpr int64_t kMinRows = 256;             // of a thread's own block, or the panels would be read too often
constexpr int64_t kPackGrainBytes = 64 << 10;  // less than this the calling thread packs alone
constexpr int64_t kItemsPerThread = 4;         // at least, where panels are divided

template <class Kernel, class T>
void pack_block(const Gemm<T>& g, int64_t first, int64_t rows, char* packed) {
  constexpr int64_t H = Kernel::kRows;
  for (int64_t r = 0; r < rows; r += H)
    Kernel::pack(g, first + r, int(std::min(H, rows - r)), packed + r * Kernel::packed_row_bytes(g.depth));
}

// C at rows [first, first + rows) x column blocks [column, last) of W panels each.
template <class Kernel, class T>
void multiply_rows(const Gemm<T>& g, const char* packed, int64_t first, int64_t rows, int64_t column, int64_t last) {
  constexpr int64_t H = Kernel::kRows, W = Kernel::kPanels;
  for (; column < last; column++) {
    int width = int(std::min(W, ceil_div(g.columns, kLanes) - column * W));
    for (int64_t r = 0; r < rows; r += H)
      Kernel::block(g, packed + r * Kernel::packed_row_bytes(g.depth), first + r, int(std::min(H, rows - r)),
                    column * W, width, r == 0);
  }
}

template <class Kernel, class T>
void gemm(const Gemm<T>& g) {
  constexpr int64_t H = Kernel::kRows, W = Kernel::kPanels;
  int64_t row_bytes = Kernel::packed_row_bytes(g.depth);
  int64_t most_rows = std::clamp<int64_t>(kBlockBytes / std::max<int64_t>(1, row_bytes) / H, 1, 512 / H) * H;
  int64_t columns = ceil_div(g.columns, kLanes * W);  // of blocks, W panels wide

  int64_t threads = num_threads();
  int64_t blocks = round_up(ceil_div(g.rows, most_rows), threads);
  if (g.rows >= 2 * threads * std::min(kMinRows, most_rows)) {
    blocks = std::max(blocks, 2 * threads);
    int64_t height = round_up(ceil_div(g.rows, blocks), H);
    parallel_for(ceil_div(g.rows, height), 1, [&](int64_t begin, int64_t end) {
      [[maybe_unused]] typename Kernel::Session session;
      for (int64_t first = begin * height; first < std::min(end * height, g.rows); first += height) {
        int64_t rows = std::min(height, g.rows - first);
        char* packed = static_cast<char*>(scratch(Scratch::kRows, round_up(rows, kLanes) * row_bytes));
        pack_block<Kernel>(g, first, rows, packed);
        multiply_rows<Kernel>(g, packed, first, rows, 0, columns);
      }
    });
    return;
  }
  char* packed = static_cast<char*>(scratch(Scratch::kRows, round_up(g.rows, kLanes) * row_bytes));
  parallel_for(ceil_div(g.rows, H), ceil_div(kPackGrainBytes, H * row_bytes + 1), [&](int64_t begin, int64_t end) {
    pack_block<Kernel>(g, begin * H, std::min(end * H, g.rows) - begin * H, packed + begin * H * row_bytes);
  });
  blocks = ceil_div(g.rows, most_rows);
  int64_t height = round_up(ceil_div(g.rows, std::max<int64_t>(1, blocks)), H);
  int64_t group = std::max<int64_t>(1, columns * blocks / (kItemsPerThread * threads));
  int64_t groups = ceil_div(columns, group);
  parallel_for(blocks * groups, 1, [&](int64_t begin, int64_t end) {
    [[maybe_unused]] typename Kernel::Session session;
    for (int64_t item = begin; item < end; item++) {
      int64_t first = item / groups * height, column = item % groups * group;
      multiply_rows<Kernel>(g, packed + first * row_bytes, first, std::min(height, g.rows - first), column,
                            std::min(columns, column + group));
    }
  });
}
