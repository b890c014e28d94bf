// Sixteen floats at a time, in the namespace of the instruction set being compiled (included by foreach_isa.h, once
// per set, so there is no include guard). GCC lowers the vector type to zmm, ymm or xmm registers as the target has.
// Every multiply-add is spelled fma(): the compiler must not choose (the build passes -ffp-contract=off).

#define SIMD_INLINE static inline __attribute__((always_inline, unused))

constexpr int kLanes = 16;
typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

SIMD_INLINE f32x16 splat(float x) { return f32x16{} + x; }

SIMD_INLINE f32x16 load(const float* p) {
  f32x16 v;
  std::memcpy(&v, p, 64);
  return v;
}
SIMD_INLINE void store(float* p, f32x16 v) { std::memcpy(p, &v, 64); }

// GCC 12 takes comparisons of vectors wider than a register apart lane by lane (exp was 386 AVX2 instructions so, and
// is 105): they go register by register.
constexpr int kRegister = ISA_LEVEL >= 2 ? 64 : ISA_LEVEL == 1 ? 32 : 16;
constexpr int kRegisters = 64 / kRegister;
typedef float f32_register __attribute__((vector_size(kRegister)));
typedef uint32_t u32_register __attribute__((vector_size(kRegister)));

SIMD_INLINE f32x16 widen(u16x16 h) {
#if ISA_LEVEL == 1
  __m128i quarter[2];
  std::memcpy(quarter, &h, 32);
  __m256i half[2] = {_mm256_cvtepu16_epi32(quarter[0]), _mm256_cvtepu16_epi32(quarter[1])};
  u32x16 w;
  std::memcpy(&w, half, 64);
  w = w << 16;
#else
  u32x16 w = __builtin_convertvector(h, u32x16) << 16;
#endif
  f32x16 v;
  std::memcpy(&v, &w, 64);
  return v;
}
// The bits of the nearest bf16 in the upper half of each lane, by the rule of round_to_bf16.
SIMD_INLINE u32x16 round_upper(f32x16 v) {
  u32x16 b;
  std::memcpy(&b, &v, 64);
#if ISA_LEVEL >= 2
  __m512i bits = (__m512i)b;
  __m512i up = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  up = _mm512_mask_sub_epi32(up, _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000)), up, _mm512_set1_epi32(-1));
  __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  return (u32x16)_mm512_mask_or_epi32(up, nan, bits, _mm512_set1_epi32(0x400000));
#else
  u32_register x[kRegisters];
  std::memcpy(x, &b, 64);
  for (int i = 0; i < kRegisters; i++) {
    u32_register up = x[i] + 0x7fff + ((x[i] >> 16) & 1), quiet = x[i] | 0x400000;
    f32_register y;
    std::memcpy(&y, &x[i], kRegister);
    x[i] = y == y ? up : quiet;
  }
  std::memcpy(&b, x, 64);
  return b;
#endif
}
SIMD_INLINE u16x16 narrow(f32x16 v) {
  u32x16 upper = round_upper(v);
#if ISA_LEVEL >= 2
  const __m512i odd = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0x1f001d, 0x1b0019, 0x170015, 0x130011, 0xf000d,
                                       0xb0009, 0x70005, 0x30001);  // words 1, 3, ... 31
  return (u16x16)_mm512_castsi512_si256(_mm512_permutexvar_epi16(odd, (__m512i)upper));
#elif ISA_LEVEL == 1
  upper = upper >> 16;
  __m256i half[2];
  std::memcpy(half, &upper, 64);
  return (u16x16)_mm256_permute4x64_epi64(_mm256_packus_epi32(half[0], half[1]), 0xd8);
#else
  return __builtin_convertvector(upper >> 16, u16x16);
#endif
}
SIMD_INLINE f32x16 round_bf16(f32x16 v) {  // widen(narrow(v))
  u32x16 upper = round_upper(v) & 0xffff0000u;
  std::memcpy(&v, &upper, 64);
  return v;
}
SIMD_INLINE f32x16 load(const bf16* p) {
  u16x16 h;
  std::memcpy(&h, p, 32);
  return widen(h);
}
SIMD_INLINE void store(bf16* p, f32x16 v) {
  u16x16 h = narrow(v);
  std::memcpy(p, &h, 32);
}

// The first n lanes (1 <= n <= 16); the rest read as `fill` and are not written.
template <class T>
SIMD_INLINE f32x16 load_n(const T* p, int n, float fill = 0.f) {
  f32x16 v = splat(fill);
  for (int i = 0; i < n; i++) v[i] = to_float(p[i]);
  return v;
}
template <class T>
SIMD_INLINE void store_n(T* p, f32x16 v, int n) {
  for (int i = 0; i < n; i++) p[i] = from_float<T>(v[i]);
}

SIMD_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
#if ISA_LEVEL >= 2
  return (f32x16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif ISA_LEVEL == 1
  // Halves by shuffles, which GCC keeps in registers; copies through arrays it spills.
#define CADUCEUS_HALF(v, i) \
  (__m256) __builtin_shufflevector(v, v, i, i + 1, i + 2, i + 3, i + 4, i + 5, i + 6, i + 7)
  __m256 low = _mm256_fmadd_ps(CADUCEUS_HALF(a, 0), CADUCEUS_HALF(b, 0), CADUCEUS_HALF(c, 0));
  __m256 high = _mm256_fmadd_ps(CADUCEUS_HALF(a, 8), CADUCEUS_HALF(b, 8), CADUCEUS_HALF(c, 8));
#undef CADUCEUS_HALF
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#else
  return a * b + c;
#endif
}

// x < y ? a : b
SIMD_INLINE f32x16 where_less(f32x16 x, f32x16 y, f32x16 a, f32x16 b) {
  f32_register p[kRegisters], q[kRegisters], r[kRegisters], s[kRegisters];
  std::memcpy(p, &x, 64), std::memcpy(q, &y, 64), std::memcpy(r, &a, 64), std::memcpy(s, &b, 64);
  for (int i = 0; i < kRegisters; i++) r[i] = p[i] < q[i] ? r[i] : s[i];
  std::memcpy(&a, r, 64);
  return a;
}

// The second operand where either is NaN.
SIMD_INLINE f32x16 max(f32x16 a, f32x16 b) {
#if ISA_LEVEL >= 2
  return (f32x16)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return where_less(b, a, a, b);
#endif
}
SIMD_INLINE f32x16 min(f32x16 a, f32x16 b) {
#if ISA_LEVEL >= 2
  return (f32x16)_mm512_min_ps((__m512)a, (__m512)b);
#else
  return where_less(a, b, a, b);
#endif
}

// Folds halves onto each other, always in this order.
typedef float f32x8 __attribute__((vector_size(32)));
typedef float f32x4 __attribute__((vector_size(16)));

SIMD_INLINE float reduce_add(f32x16 v) {
  f32x8 x[2];
  std::memcpy(x, &v, 64);
  x[0] = x[0] + x[1];
  f32x4 y[2];
  std::memcpy(y, x, 32);
  y[0] = y[0] + y[1];
  return (y[0][0] + y[0][2]) + (y[0][1] + y[0][3]);
}
SIMD_INLINE float reduce_max(f32x16 v) {
  f32x4 x[4];
  std::memcpy(x, &v, 64);
  x[0] = x[0] > x[2] ? x[0] : x[2];
  x[1] = x[1] > x[3] ? x[1] : x[3];
  x[0] = x[0] > x[1] ? x[0] : x[1];
  float a = x[0][0] > x[0][2] ? x[0][0] : x[0][2], b = x[0][1] > x[0][3] ? x[0][1] : x[0][3];
  return a > b ? a : b;
}

// e^x to about 1 ulp: x = n ln 2 + r, |r| <= ln2 / 2, a degree-6 polynomial in r (Cephes' expf coefficients), times
// 2^n. Below -87.33 it is 0 (so -inf gives 0), where e^x leaves the range of float32 inf; NaN stays NaN.
SIMD_INLINE f32x16 exp(f32x16 x) {
  f32x16 clamped = min(splat(89.f), max(splat(-88.f), x));  // in this order NaN passes
  f32x16 magic = splat(12582912.f);                          // 1.5 * 2^23: adding it rounds to an integer
  f32x16 n = fma(clamped, splat(1.44269504088896341f), magic) - magic;
  f32x16 r = fma(n, splat(-0.693359375f), clamped);
  r = fma(n, splat(2.12194440e-4f), r);
  f32x16 p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r) + 1.f;
#if ISA_LEVEL >= 2
  __mmask16 kept = _mm512_cmp_ps_mask((__m512)x, (__m512)splat(-87.33f), _CMP_NLT_UQ);  // NaN is kept
  return (f32x16)_mm512_maskz_scalef_ps(kept, (__m512)p, (__m512)n);
#else
  // 2^n in two steps: n can be 128, and 2^128 is no float. n + magic holds n in its low bits (NaN lanes hold anything,
  // but p is NaN there).
  f32x16 shifted = n + magic;
  i32x16 k;
  std::memcpy(&k, &shifted, 64);
  k = k - 0x4b400000;
  i32x16 half = k >> 1;
  i32x16 s1 = (half + 127) << 23, s2 = (k - half + 127) << 23;
  f32x16 f1, f2;
  std::memcpy(&f1, &s1, 64), std::memcpy(&f2, &s2, 64);
  return where_less(x, splat(-87.33f), f32x16{}, p * f1 * f2);
#endif
}
