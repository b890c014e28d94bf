// Every CPU kernel's entry point: what bindings.cpp calls and what the Python side documents.
#pragma once
#include <cstdint>

#include "common.h"

namespace caduceus {

// ---- linear ----

// ---- attention ----

class AttentionPlan;

struct AttentionArguments {
  const AttentionPlan* plan;
  DType dtype;
  int64_t num_heads, num_kv_heads, head_dim;
  int64_t window;  // 0: none
  float scale, eps;
  const void* qkv;    // [T, (H + 2 K) Dh]
  const float* rope;  // [rope_positions, Dh], cos | sin
  int64_t rope_positions;
  void *keys, *values;  // pages; see attention.inl
  int64_t num_pages;
  const void *q_norm, *k_norm;  // [Dh] or null
  void* out;                    // [T, H Dh]
  float* lse;                   // [T, H] log2 of the sum of 2^score, or null
};

void check_attention(const AttentionArguments& args, int64_t rows);  // throws std::invalid_argument
void attention_forward(const AttentionArguments& args);

// ---- rms_norm, swiglu, embedding ----

// ---- token_logprob, sample_token ----

// ---- adamw ----

}  // namespace caduceus
