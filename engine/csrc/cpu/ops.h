// Every CPU kernel's entry point: what bindings.cpp calls and what the Python side documents.
#pragma once
#include <cstdint>

#include "common.h"

namespace caduceus {

// ---- linear ----

// Rows [row, row + rows) of a packed [N, width] matrix from, or to, dense rows `stride` elements apart. Packing rounds
// to nearest even.
void pack_rows(void* storage, DType dtype, int64_t width, int64_t row, int64_t rows, const void* source,
               DType source_dtype, int64_t source_stride);
void unpack_rows(const void* storage, DType dtype, int64_t width, int64_t row, int64_t rows, void* target,
                 DType target_dtype, int64_t target_stride);
void advise_huge_pages(void* data, int64_t bytes);

struct LinearShape {
  int64_t tokens, columns, depth;  // x [tokens, depth], W [columns, depth], y [tokens, columns]
};

// y = x W^T + bias. x has the weight's dtype; W is packed; bias may be null. Sums are fp32 and rounded once.
void linear(const LinearShape& shape, DType dtype, const void* x, int64_t x_stride, const void* weight,
            const void* bias, DType bias_dtype, void* out, DType out_dtype);
// dx = dy W, all of one dtype, and the dense fp32 gradients: grad [columns, depth] += dy^T x, grad [columns] += sum dy.
void linear_grad_input(const LinearShape& shape, DType dtype, const void* dy, int64_t dy_stride, const void* weight,
                       void* dx);
void linear_grad_weight(const LinearShape& shape, DType dtype, const void* dy, int64_t dy_stride, const void* x,
                        int64_t x_stride, float* grad);
void linear_grad_bias(const LinearShape& shape, DType dtype, const void* dy, int64_t dy_stride, float* grad);

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
