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

SIMD_INLINE f32x16 widen(u16x16 h) {
  u32x16 w = __builtin_convertvector(h, u32x16) << 16;
  f32x16 v;
  std::memcpy(&v, &w, 64);
  return v;
}
SIMD_INLINE u16x16 narrow(f32x16 v) {  // same rounding as round_to_bf16
  u32x16 b;
  std::memcpy(&b, &v, 64);
  u32x16 rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
  u32x16 quiet = (b >> 16) | 0x40;
  return __builtin_convertvector((b & 0x7fffffffu) > 0x7f800000u ? quiet : rounded, u16x16);
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

SIMD_INLINE f32x16 max(f32x16 a, f32x16 b) { return a > b ? a : b; }
SIMD_INLINE f32x16 min(f32x16 a, f32x16 b) { return a < b ? a : b; }

// Folds halves onto each other, always in this order.
SIMD_INLINE float reduce_add(f32x16 v) {
  float x[16];
  std::memcpy(x, &v, 64);
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; i++) x[i] = x[i] + x[i + half];
  return x[0];
}
SIMD_INLINE float reduce_max(f32x16 v) {
  float x[16];
  std::memcpy(x, &v, 64);
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; i++) x[i] = x[i] > x[i + half] ? x[i] : x[i + half];
  return x[0];
}

// e^x to about 1 ulp: x = n ln 2 + r, |r| <= ln2 / 2, a degree-6 polynomial in r (Cephes' expf coefficients), times
// 2^n. Below -87.3 it is 0 (so -inf gives 0), above 88.7 inf; NaN stays NaN.
SIMD_INLINE f32x16 exp(f32x16 x) {
  f32x16 clamped = min(max(x, splat(-87.33f)), splat(88.72f));
  f32x16 magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
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
  i32x16 k = __builtin_convertvector(n, i32x16);
  // 2^n in two steps: n can be 128, and 2^128 is no float.
  i32x16 half = k >> 1;
  i32x16 s1 = (half + 127) << 23, s2 = (k - half + 127) << 23;
  f32x16 f1, f2;
  std::memcpy(&f1, &s1, 64), std::memcpy(&f2, &s2, 64);
  f32x16 y = p * f1 * f2;
  y = x < splat(-87.33f) ? splat(0.f) : y;
  y = x > splat(88.72f) ? splat(__builtin_inff()) : y;
  return x != x ? x : y;
}
