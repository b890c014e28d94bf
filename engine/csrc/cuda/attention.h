// Paged decode attention on a GPU. Plain C++: what binds it needs no CUDA header.
#pragma once
#include <cstdint>

namespace caduceus {

enum class CudaType : int { kBFloat16 = 1, kFloat16 = 2, kE4M3 = 3 };

// Addresses are of device memory. `items`, `counts`, `turns`, `parts`, `tables` and `last_keys` are the int32 lists of
// engine/kernels/triton/attention_plan.py, with tiles of at most 16 rows; how long they are is read on the device, so
// that a recorded launch takes in the next batch. The lists may name rows past num_tokens, of a batch that is larger than
// what the launch is recorded for: these are left alone.
struct AttentionDecode {
  const void* q;             // [T, H, Dh]: normed, turned and rounded
  const void* keys;          // [num_pages, K, page_size, Dh]
  const void* values;        // likewise
  const int32_t* items;      // those for few rows: counts[1] of them
  const int32_t* counts;
  const int32_t* turns;      // rows to fold: counts[2] of them
  const int32_t* parts;
  const int32_t* tables;
  const int32_t* last_keys;  // [T]
  void* out;                 // [T, H, Dh]
  float* sums;               // [.., H, Dh]: partial results, their products with V
  float* softmaxes;          // [.., H, 2]: their maximum and their sum
  CudaType type, page_type;
  int64_t num_tokens, num_heads, num_kv_heads, head_dim, page_size, window;  // a window of 0 is none
  int64_t rows_of_tile, keys_of_tile, split;                                 // as the lists were made
  float factor;              // scale * log2(e)
  bool tree_sums;            // how the Triton beside it adds up within a thread
  bool has_turns;            // whether there may be rows to fold
};

// Throws std::invalid_argument for what the kernels do not take, before anything is launched, and std::runtime_error
// for what CUDA says.
void attention_decode(const AttentionDecode& arguments, void* stream);

}  // namespace caduceus
