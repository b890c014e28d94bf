// Counter-based randomness: a number is a pure function of its coordinates, so it never depends on what else runs.
#pragma once
#include <cstdint>

namespace caduceus {

// Vigna's splitmix64 finaliser, a bijection of 64 bits in which every input bit reaches every output bit.
inline uint64_t mix64(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

// hash_seed(seed, counter) of sample_token.py; a chain mix64(... mix64(mix64(a) ^ b) ^ c).
inline uint64_t hash_seed(uint64_t seed, uint64_t counter) { return mix64(mix64(seed) ^ counter); }

// 53 bits in [0, 1).
inline double uniform(int64_t seed, int64_t counter) {
  return double(hash_seed(uint64_t(seed), uint64_t(counter)) >> 11) * 0x1p-53;
}

}  // namespace caduceus
