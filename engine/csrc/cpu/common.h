// Element types and small helpers shared by every CPU kernel.
#pragma once
#include <cstdint>
#include <cstring>

namespace caduceus {

enum DType : int { kFloat32 = 0, kBFloat16 = 1 };

struct bf16 {
  uint16_t bits;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
inline bf16 round_to_bf16(float x) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t((bits >> 16) | 0x40)};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <class T>
inline T from_float(float x);
template <>
inline float from_float<float>(float x) { return x; }
template <>
inline bf16 from_float<bf16>(float x) { return round_to_bf16(x); }

// 2 bf16 or 1 float share a 32-bit lane of a packed panel: the reduction dimension is stored in groups of this many.
template <class T>
constexpr int kPair = sizeof(T) == 2 ? 2 : 1;

}  // namespace caduceus
