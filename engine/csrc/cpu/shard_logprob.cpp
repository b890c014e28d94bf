#define ISA_FILE "shard_logprob.inl"
#include "foreach_isa.h"

#include <stdexcept>
#include <string>

#include "ops.h"

namespace caduceus {

void shard_statistics(const float* logits, const int32_t* targets, const float* inv_temperature, double* statistics,
                      int64_t rows, int64_t vocab, int64_t count) {
  for (int64_t i = 0; i < rows * count; i++)
    if (targets[i] < -1 || targets[i] >= vocab)
      throw std::out_of_range("target " + std::to_string(targets[i]) + " of row " + std::to_string(i / count) +
                              " is outside the shard's " + std::to_string(vocab) +
                              " columns; pass -1 for one in another shard");
  CADUCEUS_DISPATCH3(shard_statistics_rows)(logits, targets, inv_temperature, statistics, rows, vocab, count);
}

// In double, and the same code for every instruction set. One shard folds to its own numbers: exp(0) is 1.
void fold_statistics(const double* statistics, float* logprobs, float* entropy, float* stats, int64_t shards,
                     int64_t rows, int64_t count) {
  const double minus_inf = -std::numeric_limits<double>::infinity();
  int64_t width = 3 + count;
  parallel_for(rows, std::max<int64_t>(1, 1024 / (shards * width)), [=](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      auto shard = [=](int64_t s) { return statistics + (s * rows + r) * width; };
      double largest = minus_inf, total = 0.0, moment = 0.0;
      for (int64_t s = 0; s < shards; s++) largest = shard(s)[0] > largest ? shard(s)[0] : largest;
      for (int64_t s = 0; s < shards; s++) {
        if (shard(s)[1] == 0.0) continue;  // no mass; its maximum is -inf
        double shift = shard(s)[0] - largest, scale = std::exp(shift);
        total += shard(s)[1] * scale;
        moment += scale * (shard(s)[2] + shard(s)[1] * shift);
      }
      if (total == 0.0) total = std::numeric_limits<double>::quiet_NaN();  // nothing but -inf has no softmax
      double log_total = std::log(total);
      for (int64_t i = 0; i < count; i++) {
        double z = minus_inf;  // one shard knows better
        for (int64_t s = 0; s < shards; s++) z = shard(s)[3 + i] > z ? shard(s)[3 + i] : z;
        logprobs[r * count + i] = float((z - largest) - log_total);
      }
      entropy[r] = float(log_total - moment / total);
      stats[2 * r] = float(largest), stats[2 * r + 1] = float(log_total);
    }
  });
}

}  // namespace caduceus
