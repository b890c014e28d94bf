// THE softmax statistics of one row of logits, shared by the sampler and the trainer: equal logits give equal bits.
//
// z = logit * inv_temperature. The row is read once, in chunks of 256: a chunk's maximum m_c, then
// s_c = sum exp(z - m_c) in 16 lanes. With M = max m_c the chunks fold in order, in double:
// total = sum_c s_c * exp(m_c - M), and log p(t) = (z_t - M) - log(total).
// A NaN or +inf anywhere makes the total, and with it every log-probability of the row, NaN.
#include "row.h"

constexpr int64_t kChunk = 256;

SIMD_INLINE int64_t chunks_of(int64_t vocab) { return ceil_div(vocab, kChunk); }
SIMD_INLINE int64_t scratch_floats(int64_t vocab) { return 4 * round_up(chunks_of(vocab), kLanes); }

struct SoftmaxRow {
  float max;
  double total;      // sum of exp(z - max)
  double log_total;  // a row's entropy is log_total - sum p * (z - max)
  double moment;     // sum of exp(z - max) * (z - max); only where asked for
  const float* chunk_max;
  const float* chunk_sum;    // sum of exp(z - chunk_max)
  const float* chunk_scale;  // exp(chunk_max - max)
};

// Log-probability of a token whose scaled logit is z.
SIMD_INLINE float logprob_of(const SoftmaxRow& row, float z) {
  return float((double(z) - double(row.max)) - row.log_total);
}

// A chunk that holds nothing but -inf must not become NaN: its exponentials are taken against 0 and are all 0.
SIMD_INLINE float shift_of(float chunk_max) { return chunk_max == -__builtin_inff() ? 0.f : chunk_max; }

struct ChunkSums {
  float max, sum, moment;
};
template <bool kMoment>
SIMD_INLINE ChunkSums sum_chunk(const float* p, int64_t columns, float inv_temperature) {
  const float minus_inf = -__builtin_inff();
  f32x16 largest = splat(minus_inf), sum = {}, moment = {};
  for (int64_t k = 0; k < columns; k += kLanes)
    largest = max(largest, load_lanes(p + k, lanes_at(k, columns), minus_inf) * inv_temperature);
  ChunkSums out{reduce_max(largest), 0.f, 0.f};
  f32x16 shift = splat(shift_of(out.max));
  for (int64_t k = 0; k < columns; k += kLanes) {
    f32x16 d = load_lanes(p + k, lanes_at(k, columns), minus_inf) * inv_temperature - shift;
    f32x16 e = exp(d);
    sum = sum + e;
    if constexpr (kMoment) moment = fma(e, max(d, splat(-100.f)), moment);  // exp(-100) is 0: 0 * -inf must be 0
  }
  out.sum = reduce_add(sum);
  if constexpr (kMoment) out.moment = reduce_add(moment);
  return out;
}

// `scratch` holds scratch_floats(vocab) floats; the result points into it.
template <bool kMoment>
SIMD_INLINE SoftmaxRow softmax_row(const float* logits, int64_t vocab, float inv_temperature, float* scratch) {
  int64_t chunks = chunks_of(vocab), padded = round_up(chunks, kLanes);
  float *chunk_max = scratch, *chunk_sum = scratch + padded, *chunk_scale = scratch + 2 * padded;
  float* chunk_moment = scratch + 3 * padded;
  float row_max = -__builtin_inff();
  for (int64_t c = 0; c < chunks; c++) {
    const float* p = logits + c * kChunk;
    int64_t columns = std::min(kChunk, vocab - c * kChunk);
    // A known number of columns lets the compiler unroll.
    ChunkSums s = columns == kChunk ? sum_chunk<kMoment>(p, kChunk, inv_temperature)
                                    : sum_chunk<kMoment>(p, columns, inv_temperature);
    chunk_max[c] = s.max, chunk_sum[c] = s.sum;
    if constexpr (kMoment) chunk_moment[c] = s.moment;
    row_max = s.max > row_max ? s.max : row_max;
  }
  SoftmaxRow row{row_max, 0.0, 0.0, 0.0, chunk_max, chunk_sum, chunk_scale};
  for (int64_t c = 0; c < chunks; c += kLanes)
    store(chunk_scale + c, exp(load_lanes(chunk_max + c, lanes_at(c, chunks)) - splat(row.max)));
  for (int64_t c = 0; c < chunks; c++) {
    row.total += double(chunk_sum[c]) * double(chunk_scale[c]);
    if constexpr (kMoment)
      if (chunk_sum[c] != 0.f)
        row.moment += double(chunk_scale[c]) *
                      (double(chunk_moment[c]) + double(chunk_sum[c]) * (double(chunk_max[c]) - double(row.max)));
  }
  row.log_total = std::log(row.total);
  return row;
}
