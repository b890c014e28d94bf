#include <stdexcept>
#include <string>

#include "attention_plan.h"
#include "ops.h"

#define ISA_MATRIX
#define ISA_FILE "attention.inl"
#include "foreach_isa.h"

namespace caduceus {

void check_attention(const AttentionArguments& args, int64_t rows) {
  const AttentionPlan &plan = *args.plan, &kv_plan = *args.kv_plan;
  if (rows != plan.num_tokens())
    throw std::invalid_argument("attention: qkv has " + std::to_string(rows) + " rows and the plan " +
                                std::to_string(plan.num_tokens()) + "; build the plan for this batch");
  if (kv_plan.num_tokens() > args.kv_rows)
    throw std::invalid_argument("attention: kv has " + std::to_string(args.kv_rows) + " rows and its plan " +
                                std::to_string(kv_plan.num_tokens()) + "; build the plan for this batch");
  if (&plan != &kv_plan && plan.kv_version != kv_plan.version)
    throw std::invalid_argument("attention: the plan of the keys was built anew after that of the queries; build both "
                                "for this batch, keys first");
  if (kv_plan.num_positions > args.rope_positions)
    throw std::invalid_argument("attention: a position is " + std::to_string(kv_plan.num_positions - 1) +
                                " and the RoPE table ends at " + std::to_string(args.rope_positions - 1) +
                                "; make it longer (max_position_embeddings)");
  if (kv_plan.num_pages > args.num_pages)
    throw std::invalid_argument("attention: the plan names page " + std::to_string(kv_plan.num_pages - 1) + " of " +
                                std::to_string(args.num_pages));
}

void attention_forward(const AttentionArguments& args) { CADUCEUS_DISPATCH5(attention_forward(args)); }

}  // namespace caduceus
