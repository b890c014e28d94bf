// Re-laying operands for the products of the backward: transposes in blocks of 16 x 16 lanes. Included by linear.inl.

#if ISA_LEVEL >= 2
// Lanes of (a, b) by number, b's from 16 on; 4 x 32 bits in each of the four 128-bit quarters, then whole quarters.
#define QUARTERS(a, b, i, j, k, l)                                                                                 \
  __builtin_shuffle(a, b, u32x16{i, j, k, l, i + 4, j + 4, k + 4, l + 4, i + 8, j + 8, k + 8, l + 8, i + 12, j + 12, \
                                 k + 12, l + 12})
#define WHOLE(a, b, i, j)                                                                                           \
  __builtin_shuffle(a, b, u32x16{i * 4, i * 4 + 1, i * 4 + 2, i * 4 + 3, j * 4, j * 4 + 1, j * 4 + 2, j * 4 + 3,     \
                                 i * 4 + 16, i * 4 + 17, i * 4 + 18, i * 4 + 19, j * 4 + 16, j * 4 + 17, j * 4 + 18, \
                                 j * 4 + 19})
SIMD_INLINE void transpose(u32x16 (&x)[16]) {
  u32x16 y[16];
  for (int i = 0; i < 16; i += 2) {
    y[i] = QUARTERS(x[i], x[i + 1], 0, 16, 1, 17);
    y[i + 1] = QUARTERS(x[i], x[i + 1], 2, 18, 3, 19);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {  // x[i + c]: column c of each 4 x 4 block of rows i .. i + 3, one per quarter
      x[i + 2 * j] = QUARTERS(y[i + j], y[i + j + 2], 0, 1, 16, 17);
      x[i + 2 * j + 1] = QUARTERS(y[i + j], y[i + j + 2], 2, 3, 18, 19);
    }
  for (int j = 0; j < 4; j++) {
    y[j] = WHOLE(x[j], x[j + 4], 0, 2);           // rows 0-7, columns j and j + 8
    y[j + 4] = WHOLE(x[j], x[j + 4], 1, 3);       // rows 0-7, columns j + 4 and j + 12
    y[j + 8] = WHOLE(x[j + 8], x[j + 12], 0, 2);  // rows 8-15, the same columns
    y[j + 12] = WHOLE(x[j + 8], x[j + 12], 1, 3);
  }
  for (int j = 0; j < 8; j++) {
    x[j] = WHOLE(y[j], y[j + 8], 0, 2);
    x[j + 8] = WHOLE(y[j], y[j + 8], 1, 3);
  }
}
#undef QUARTERS
#undef WHOLE
#else
SIMD_INLINE void transpose(u32x16 (&rows)[16]) {
  uint32_t x[16][16];
  std::memcpy(x, rows, sizeof x);
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < i; j++) std::swap(x[i][j], x[j][i]);
  std::memcpy(rows, x, sizeof x);
}
#endif

// The first n (0 to 16) elements' bits; the rest are zero, and memory past them is not read.
SIMD_INLINE u16x16 load_bits(const bf16* p, int n) {
  u16x16 v = {};
  if (n == kLanes) {
    std::memcpy(&v, p, 32);
    return v;
  }
#if ISA_LEVEL >= 2
  return (u16x16)_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p);
#else
  std::memcpy(&v, p, n * 2);
  return v;
#endif
}
SIMD_INLINE u32x16 load_bits(const float* p, int n) {
  u32x16 v = {};
  if (n == kLanes) {
    std::memcpy(&v, p, 64);
    return v;
  }
#if ISA_LEVEL >= 2
  return (u32x16)_mm512_maskz_loadu_epi32(__mmask16((1u << n) - 1), p);
#else
  std::memcpy(&v, p, n * 4);
  return v;
#endif
}
SIMD_INLINE void store_bits(void* to, u32x16 v, int n) {
  if (n == kLanes) {
    std::memcpy(to, &v, 64);
    return;
  }
#if ISA_LEVEL >= 2
  _mm512_mask_storeu_epi32(to, __mmask16((1u << n) - 1), (__m512i)v);
#else
  std::memcpy(to, &v, n * 4);
#endif
}

SIMD_INLINE u32x16 widen_bits(u32x16 v) { return v; }
SIMD_INLINE u32x16 widen_bits(u16x16 v) { return __builtin_convertvector(v, u32x16) << 16; }

// (even[i], odd[i]) in lane i.
SIMD_INLINE u32x16 interleave(u16x16 even, u16x16 odd) {
  return __builtin_convertvector(even, u32x16) | __builtin_convertvector(odd, u32x16) << 16;
}

// B panels from B itself, [depth, columns] row-major: one panel, whose first column is `column`.
void pack_panel(float* to, const float* from, int64_t stride, int64_t column, int64_t columns, int64_t depth) {
  int n = int(std::min<int64_t>(kLanes, columns - column));
  for (int64_t k = 0; k < depth; k++, to += kLanes) store_bits(to, load_bits(from + k * stride + column, n), kLanes);
}
void pack_panel(bf16* to, const bf16* from, int64_t stride, int64_t column, int64_t columns, int64_t depth) {
  int n = int(std::min<int64_t>(kLanes, columns - column));
  for (int64_t k = 0; k < depth; k += 2, to += 2 * kLanes) {
    const bf16* row = from + k * stride + column;
    store_bits(to, interleave(load_bits(row, n), load_bits(row + stride, k + 1 < depth ? n : 0)), kLanes);
  }
}

// Panels of W^T from `panels` panels of W: the one (fp32) or two (bf16) that hold the columns of W from `column` on,
// which lie `to_stride` apart. `column` is a multiple of 16 or 32; columns past the width come out zero.
void transpose_panels(float* to, int64_t, const float* from, int64_t panel_stride, int64_t panels, int64_t column,
                      int64_t width) {
  for (int64_t p = 0; p < panels; p++, from += panel_stride) {
    u32x16 block[16];
    for (int i = 0; i < 16; i++) block[i] = load_bits(from + (column + i) * kLanes, column + i < width ? kLanes : 0);
    transpose(block);  // block[n] = the 16 columns of row n
    std::memcpy(to + p * kLanes * kLanes, block, sizeof block);
  }
}
void transpose_panels(bf16* to, int64_t to_stride, const bf16* from, int64_t panel_stride, int64_t panels,
                      int64_t column, int64_t width) {
  int64_t pairs = ceil_div(width, 2);
  for (int64_t p = 0; p < panels; p++, from += panel_stride) {
    u32x16 block[16];
    for (int i = 0; i < 16; i++) {
      block[i] = u32x16{};
      if (column / 2 + i < pairs) std::memcpy(&block[i], from + (column / 2 + i) * 2 * kLanes, 64);
    }
    transpose(block);  // block[n] = the 32 columns of row n
    for (int n = 0; n < 16; n += 2) {
      u16x16 even[2], odd[2];
      std::memcpy(even, &block[n], 64), std::memcpy(odd, &block[n + 1], 64);
      bf16* at = to + (p * kLanes + n) * kLanes;
      store_bits(at, interleave(even[0], odd[0]), kLanes);
      if (column + kLanes < width) store_bits(at + to_stride, interleave(even[1], odd[1]), kLanes);
    }
  }
}
