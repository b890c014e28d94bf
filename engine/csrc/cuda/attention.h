// Paged decode attention on a GPU. Plain C++: what binds it needs no CUDA header.
#pragma once
#include <cstdint>

namespace caduceus {

enum class CudaType : int { kBFloat16 = 1, kFloat16 = 2, kE4M3 = 3 };

// Addresses are of device memory. An item is the int32 numbers that engine/kernels/triton/attention_plan.py lists:
// rows of one key/value head, (token, query head) pairs, and a range of keys; every key/value head has all items.
struct AttentionDecode {
  const void* q;               // [T, H, Dh]: normed, turned and rounded
  const void* keys;            // [num_pages, K, page_size, Dh]
  const void* values;          // likewise
  const int32_t* items;        // [.., 8]
  const int32_t* num_items;    // one number, read on the device: a recorded launch takes in the next batch
  const int32_t* tables;       // pages of every sequence, one list after the other
  const int32_t* last_keys;    // [T]: the last key that a row sees
  void* out;                   // [T, H, Dh], by items that have all keys of their rows
  float* lse;                  // [T, H] or null
  float* partial_out;          // [.., H, Dh]: by items of a single split
  float* partial_stats;        // [.., H, 2]: their largest score and their sum
  CudaType type, page_type;
  int64_t num_heads, num_kv_heads, head_dim, page_size, window;  // a window of 0 is none
  float scale;                 // of the scores, log2(e) included
};

// Throws std::invalid_argument for what the kernels do not take, before anything is launched, and std::runtime_error
// for what CUDA says.
void attention_decode(const AttentionDecode& arguments, void* stream);

}  // namespace caduceus
