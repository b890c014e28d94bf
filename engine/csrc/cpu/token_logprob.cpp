#define ISA_FILE "token_logprob.inl"
#include "foreach_isa.h"
#include "ops.h"

namespace caduceus {
namespace {

template <class T>
void backward(const float* logits, const int32_t* targets, const float* inv_temperature, const float* stats,
              const float* entropy, const float* d_logprob, const float* d_entropy, void* d_logits, int64_t rows,
              int64_t vocab) {
  CADUCEUS_DISPATCH3(logits_logprob_backward_rows<T>)
  (logits, targets, inv_temperature, stats, entropy, d_logprob, d_entropy, static_cast<T*>(d_logits), rows, vocab);
}

}  // namespace

void logits_logprob(const float* logits, const int32_t* targets, const float* inv_temperature, float* logprobs,
                    float* entropy, float* stats, int64_t rows, int64_t vocab, int64_t count) {
  check_token_ids(targets, rows * count, vocab);
  CADUCEUS_DISPATCH3(logits_logprob_rows)
  (logits, targets, inv_temperature, logprobs, entropy, stats, rows, vocab, count);
}

void logits_logprob_backward(int dtype, const float* logits, const int32_t* targets, const float* inv_temperature,
                             const float* stats, const float* entropy, const float* d_logprob, const float* d_entropy,
                             void* d_logits, int64_t rows, int64_t vocab) {
  (dtype == kFloat32 ? backward<float> : backward<bf16>)(logits, targets, inv_temperature, stats, entropy, d_logprob,
                                                         d_entropy, d_logits, rows, vocab);
}

}  // namespace caduceus
