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

// Queries are the rows of `plan`, keys and values those of `kv_plan`. Where both are columns of one matrix, q points to
// it, kv = q + H Dh, the row sizes are the same and so are the plans.
struct AttentionArguments {
  const AttentionPlan *plan, *kv_plan;
  DType dtype;
  int64_t num_heads, num_kv_heads, head_dim;
  int64_t window;  // 0: none
  float scale, eps;
  const void* q;       // [T] rows, q_row_size elements apart, that begin with H query heads
  int64_t q_row_size;
  const void* kv;      // [kv_rows] rows, kv_row_size elements apart, that begin with K key heads, then K value heads
  int64_t kv_row_size, kv_rows;
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
// From the forward's arguments (its pages are not read): writes d_q and d_kv, which lie as q and kv do but for their row
// sizes, and adds to d_q_norm and d_k_norm [Dh] or null. d_kv is the sum over the queries of `plan`.
struct AttentionGradients {
  const void* d_out;  // [T, H Dh]
  void* d_q;
  int64_t d_q_row_size;
  void* d_kv;
  int64_t d_kv_row_size;
  float *d_q_norm, *d_k_norm;
};
void attention_backward(const AttentionArguments& args, const AttentionGradients& grads);

// ---- rms_norm, swiglu, embedding ----

// out = normed x [rows, width]; with `delta`, sum = x + delta and out = normed sum. `rstd` [rows] may be null.
void rms_norm(int dtype, const void* x, const void* delta, const void* weight, void* sum, void* out, float* rstd,
              int64_t rows, int64_t width, float eps);
// Writes dx (plus `d_sum`, which may be null) and adds to weight_grad [width].
void rms_norm_backward(int dtype, const void* dy, const void* d_sum, const void* x, const void* weight,
                       const float* rstd, void* dx, float* weight_grad, int64_t rows, int64_t width);

// gate_up [rows, 2 * width] -> out [rows, width]
void swiglu(int dtype, const void* gate_up, void* out, int64_t rows, int64_t width);
void swiglu_backward(int dtype, const void* dy, const void* gate_up, void* d_gate_up, int64_t rows, int64_t width);

// Throws std::out_of_range for an id outside [0, vocab).
void check_token_ids(const int32_t* tokens, int64_t count, int64_t vocab);

// The weight [vocab, width] holds rows [first_row, first_row + vocab) of a bigger table, and an id outside of them reads
// as a row of zeros; or, with kWholeTable, every row, and an id outside throws as above before memory is touched.
constexpr int64_t kWholeTable = -1;
void embedding(int dtype, const int32_t* tokens, const void* weight, bool packed, void* out, int64_t rows,
               int64_t vocab, int64_t width, int64_t first_row);
// Adds to weight_grad [vocab, width]; skips ids outside of its rows.
void embedding_backward(int dtype, const int32_t* tokens, const void* dy, float* weight_grad, int64_t rows,
                        int64_t vocab, int64_t width, int64_t first_row);

// ---- token_logprob, sample_token ----

// targets [rows, count] -> logprobs [rows, count]; `inv_temperature` [rows], `entropy` [rows] and `stats` [rows, 2]
// (what the backward reads) may be null. Throws std::out_of_range for a target outside [0, vocab).
void logits_logprob(const float* logits, const int32_t* targets, const float* inv_temperature, float* logprobs,
                    float* entropy, float* stats, int64_t rows, int64_t vocab, int64_t count);
// One target per row, -1 for one in another shard of the vocabulary; d_logits [rows, vocab] of `dtype` may be the logits themselves when that is float32.
void logits_logprob_backward(int dtype, const float* logits, const int32_t* targets, const float* inv_temperature,
                             const float* stats, const float* entropy, const float* d_logprob, const float* d_entropy,
                             void* d_logits, int64_t rows, int64_t vocab);

// What a shard of the vocabulary knows of each row: (max, sum of exp(z - max), sum of exp(z - max) * (z - max), and z of
// each of its `count` targets or -inf), z = logit * inv_temperature; a target of -1 is in another shard. A shard without
// mass has sums of 0. Throws std::out_of_range for a target outside [-1, vocab).
void shard_statistics(const float* logits, const int32_t* targets, const float* inv_temperature, double* statistics,
                      int64_t rows, int64_t vocab, int64_t count);
// Statistics [shards, rows, 3 + count], folded in the order of the shards, to what logits_logprob gives.
void fold_statistics(const double* statistics, float* logprobs, float* entropy, float* stats, int64_t shards,
                     int64_t rows, int64_t count);

// A row whose softmax is not a number gets token -1 and NaN. A temperature of 0 takes the likeliest token.
void sample_token(const float* logits, const float* temperature, const int32_t* top_k, const float* top_p,
                  const float* min_p, const int64_t* seed, const int64_t* counter, int32_t* tokens, float* logprobs,
                  float* kept_mass, int64_t rows, int64_t vocab);

// ---- adamw ----

struct AdamWSettings {
  // double: 1 - 0.999f is off by 5e-5 of its value
  double learning_rate, beta1, beta2, eps, weight_decay;
  double grad_scale;  // multiplies the gradient
  int64_t step;       // 1 for the first
};

// Steps fp32 master weights [rows, width] and writes the compute weight, dense or packed, from them.
void adamw(int dtype, bool packed, const AdamWSettings& settings, const float* grad, float* master, float* exp_avg,
           float* exp_avg_sq, void* weight, int64_t rows, int64_t width);
double squared_norm(const float* values, int64_t count);

}  // namespace caduceus
