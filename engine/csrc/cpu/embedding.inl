// Rows of an embedding matrix, dense [V, D] or packed into panels of 16 rows (a tied head's layout), and its gradient.
// The matrix holds rows [first_row, first_row + V) of the whole table; ids outside of them are other ranks'.
#include "row.h"

template <class T>
static void embedding_rows(const int32_t* tokens, const T* weight, bool packed, T* out, int64_t rows, int64_t vocab,
                           int64_t width, int64_t first_row) {
  parallel_for(rows, rows_per_item(width), [=](int64_t begin, int64_t end) {
    constexpr int pair = kPair<T>;
    int64_t panel_elements = round_up(width, pair) * 16;
    for (int64_t row = begin; row < end; row++) {
      int64_t token = tokens[row] - first_row;
      T* to = out + row * width;
      if (token < 0 || token >= vocab) {
        std::memset(to, 0, size_t(width) * sizeof(T));
        continue;
      }
      if (!packed) {
        std::memcpy(to, weight + token * width, size_t(width) * sizeof(T));
        continue;
      }
      const T* from = weight + token / 16 * panel_elements + token % 16 * pair;
      int64_t k = 0;
      for (; k + pair <= width; k += pair) std::memcpy(to + k, from + k * 16, 4);
      if (k < width) to[k] = from[k * 16];
    }
  });
}

// weight_grad[tokens[t] - first_row] += dy[t]. A thread owns columns and walks the tokens in order, so a sum never
// depends on how the columns were shared out.
template <class T>
static void embedding_backward_rows(const int32_t* tokens, const T* dy, float* weight_grad, int64_t rows,
                                    int64_t vocab, int64_t width, int64_t first_row) {
  int64_t blocks = ceil_div(width, kLanes);
  if (rows == 0) return;
  int64_t grain = std::max(ceil_div(kGrainElements, rows * kLanes), ceil_div(blocks, num_threads()));
  parallel_for(blocks, grain, [=](int64_t begin, int64_t end) {
    int64_t from = begin * kLanes, until = std::min(width, end * kLanes);
    for (int64_t row = 0; row < rows; row++) {
      int64_t token = tokens[row] - first_row;
      if (token < 0 || token >= vocab) continue;
      const T* g = dy + row * width;
      float* sum = weight_grad + token * width;
      for (int64_t k = from; k < until; k += kLanes) {
        int lanes = lanes_at(k, until);
        store_lanes(sum + k, load_lanes(sum + k, lanes) + load_lanes(g + k, lanes), lanes);
      }
    }
  });
}
