#include <algorithm>
#include <numeric>
#include <type_traits>
#include <vector>

#include "attention_plan.h"
#include "ops.h"

namespace caduceus {

struct AttentionBackwardArguments : AttentionGradients {
  float* partial_norms;       // [S, K, 2, Dh] gradients of q_norm and k_norm, per item
  const int32_t* sequences;   // of the keys' plan, those with rows, the one with most queries first
  int64_t num_items;          // (sequence, kv head) pairs
};

}  // namespace caduceus

#define ISA_MATRIX
#define ISA_FILE "attention_backward.inl"
#include "foreach_isa.h"

namespace caduceus {

void attention_backward(const AttentionArguments& args, const AttentionGradients& given) {
  const AttentionPlan &plan = *args.kv_plan, &queries = *args.plan;
  const int64_t heads = args.num_kv_heads, dim = args.head_dim;
  auto length = [&](int32_t s) { return plan.cu_seqlens[s + 1] - plan.cu_seqlens[s]; };
  auto num_queries = [&](int32_t s) { return queries.query_starts[s + 1] - queries.query_starts[s]; };
  std::vector<int32_t> sequences(size_t(plan.num_sequences));
  std::iota(sequences.begin(), sequences.end(), 0);
  std::erase_if(sequences, [&](int32_t s) { return length(s) == 0; });
  std::stable_sort(sequences.begin(), sequences.end(), [&](int32_t a, int32_t b) { return num_queries(a) > num_queries(b); });
  std::vector<float> partial(size_t(plan.num_sequences * heads * 2 * dim));
  const AttentionBackwardArguments grads{given, partial.data(), sequences.data(), int64_t(sequences.size()) * heads};
  CADUCEUS_DISPATCH5(attention_backward(args, grads));
  for (int64_t item = 0; item < plan.num_sequences * heads; item++)  // in the order of the batch
    for (int64_t d = 0; d < dim; d++) {
      if (given.d_q_norm) given.d_q_norm[d] += partial[item * 2 * dim + d];
      if (given.d_k_norm) given.d_k_norm[d] += partial[(item * 2 + 1) * dim + d];
    }
}

}  // namespace caduceus
