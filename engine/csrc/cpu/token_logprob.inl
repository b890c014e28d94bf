// Log-probability and entropy of given tokens under a row's softmax, and the gradient with respect to the logits.
#include "softmax_row.h"

// `targets` holds `count` ids per row; `logprobs` [rows, count]; `entropy` [rows] and `stats` [rows, 2] (the row's
// maximum and log of its total, which the gradient reads) may be null. `inv_temperature` null stands for ones.
static void logits_logprob_rows(const float* logits, const int32_t* targets, const float* inv_temperature,
                                float* logprobs, float* entropy, float* stats, int64_t rows, int64_t vocab,
                                int64_t count) {
  parallel_for(rows, rows_per_item(vocab), [=](int64_t begin, int64_t end) {
    std::unique_ptr<float[]> scratch(new float[scratch_floats(vocab)]);
    for (int64_t r = begin; r < end; r++) {
      const float* z = logits + r * vocab;
      float scale = inv_temperature ? inv_temperature[r] : 1.f;
      SoftmaxRow row = entropy ? softmax_row<true>(z, vocab, scale, scratch.get())
                               : softmax_row<false>(z, vocab, scale, scratch.get());
      for (int64_t i = 0; i < count; i++)
        logprobs[r * count + i] = logprob_of(row, z[targets[r * count + i]] * scale);
      if (entropy) entropy[r] = float(row.log_total - row.moment / row.total);
      if (stats) stats[2 * r] = row.max, stats[2 * r + 1] = float(row.log_total);
    }
  });
}

// d_logits = inv_temperature * (g * (onehot - p) - h * p * (log p + entropy)), g and h the gradients of the
// log-probability and the entropy. May write over the logits. A target of -1 is in another shard of the vocabulary;
// `stats` and `entropy` are then of the whole row.
template <class T>
static void logits_logprob_backward_rows(const float* logits, const int32_t* targets, const float* inv_temperature,
                                         const float* stats, const float* entropy, const float* d_logprob,
                                         const float* d_entropy, T* d_logits, int64_t rows, int64_t vocab) {
  parallel_for(rows, rows_per_item(vocab), [=](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      const float* z = logits + r * vocab;
      float scale = inv_temperature ? inv_temperature[r] : 1.f;
      float largest = stats[2 * r], log_total = stats[2 * r + 1];
      float g = d_logprob[r], h = d_entropy[r], offset = g + h * entropy[r];
      int64_t target = targets[r];
      float target_logprob = target < 0 ? 0.f : std::max(z[target] * scale - largest - log_total, -200.f);
      for (int64_t k = 0; k < vocab; k += kLanes) {
        int lanes = lanes_at(k, vocab);
        f32x16 logp = max(load_lanes(z + k, lanes) * scale - largest - log_total, splat(-200.f));
        f32x16 weight = fma(logp, splat(h), splat(offset));
        store_lanes(d_logits + r * vocab + k, exp(logp) * weight * -scale, lanes);
      }
      if (target < 0) continue;
      f32x16 p = exp(splat(target_logprob));
      d_logits[r * vocab + target] = from_float<T>(scale * (g - p[0] * (target_logprob * h + offset)));
    }
  });
}
