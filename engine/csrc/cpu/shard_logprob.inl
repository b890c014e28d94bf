// The softmax statistics of a shard of a row of logits: what the other shards' ranks need to know of it.
#include "softmax_row.h"

// statistics [rows, 3 + count]: max, total, moment, and z of each target or -inf where it is -1.
static void shard_statistics_rows(const float* logits, const int32_t* targets, const float* inv_temperature,
                                  double* statistics, int64_t rows, int64_t vocab, int64_t count) {
  parallel_for(rows, rows_per_item(vocab), [=](int64_t begin, int64_t end) {
    std::unique_ptr<float[]> scratch(new float[scratch_floats(vocab)]);
    for (int64_t r = begin; r < end; r++) {
      const float* z = logits + r * vocab;
      float scale = inv_temperature ? inv_temperature[r] : 1.f;
      SoftmaxRow row = softmax_row<true>(z, vocab, scale, scratch.get());
      if (row.max == -__builtin_inff()) {
        // Nothing but -inf, which is no mass (as a whole row it would be NaN), or a NaN, which its chunk's sum kept.
        row.total = 0.0;
        for (int64_t c = 0; c < chunks_of(vocab); c++) row.total += double(row.chunk_sum[c]);
        row.moment = row.total;
      }
      double* out = statistics + r * (3 + count);
      out[0] = row.max, out[1] = row.total, out[2] = row.moment;
      for (int64_t i = 0; i < count; i++) {
        int64_t target = targets[r * count + i];
        out[3 + i] = target < 0 ? -__builtin_inf() : double(z[target] * scale);
      }
    }
  });
}
