#define ISA_FILE "sample_token.inl"
#include "hash.h"
#include "foreach_isa.h"
#include "ops.h"

namespace caduceus {

void sample_token(const float* logits, const float* temperature, const int32_t* top_k, const float* top_p,
                  const float* min_p, const int64_t* seed, const int64_t* counter, int32_t* tokens, float* logprobs,
                  float* kept_mass, int64_t rows, int64_t vocab) {
  CADUCEUS_DISPATCH3(sample_token_rows)
  (logits, temperature, top_k, top_p, min_p, seed, counter, tokens, logprobs, kept_mass, rows, vocab);
}

}  // namespace caduceus
