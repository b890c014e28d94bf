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

// Work is cut into items of kRowBlock rows by some panels: rows so many that a panel is read from memory seldom, panels
// so many that there are a few items per thread.
constexpr int64_t kRowBlock = 256;

template <class Kernel, class T>
void gemm(const Gemm<T>& g) {
  if (g.rows == 0 || g.columns == 0) return;
  int64_t panels = ceil_div(g.columns, kLanes);
  int64_t row_blocks = ceil_div(g.rows, kRowBlock);
  int64_t block_rows = round_up(ceil_div(g.rows, row_blocks), Kernel::kRows);
  row_blocks = ceil_div(g.rows, block_rows);
  int64_t groups = std::max<int64_t>(1, 4 * num_threads() / row_blocks);
  int64_t group = round_up(ceil_div(panels, groups), Kernel::kPanels);
  groups = ceil_div(panels, group);

  parallel_for(row_blocks * groups, 1, [&](int64_t begin, int64_t end) {
    [[maybe_unused]] typename Kernel::Session session;
    for (int64_t item = begin; item < end; item++) {
      int64_t row = item / groups * block_rows, panel = item % groups * group;
      int64_t rows = std::min(block_rows, g.rows - row), last = std::min(panels, panel + group);
      auto a = Kernel::prepare(g, row, rows);
      alignas(64) float sums[Kernel::kSums];
      for (; panel < last; panel += Kernel::kPanels) {
        int width = int(std::min<int64_t>(Kernel::kPanels, last - panel));
        for (int64_t r = 0; r < rows; r += Kernel::kRows) {
          int height = int(std::min<int64_t>(Kernel::kRows, rows - r));
          if (g.start) begin_block(g, row + r, height, panel, width, sums);
          Kernel::run(a, r, height, g.panels + panel * g.panel_stride, g.panel_stride, width, g.depth, sums,
                      g.start != nullptr);
          end_block(g, row + r, height, panel, width, sums);
        }
      }
    }
  });
}
