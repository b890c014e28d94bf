#define ISA_FILE "embedding.inl"
#include "foreach_isa.h"

#include <stdexcept>
#include <string>

#include "ops.h"

namespace caduceus {
namespace {

template <class T>
void forward(const int32_t* tokens, const void* weight, bool packed, void* out, int64_t rows, int64_t vocab,
             int64_t width, int64_t first_row) {
  CADUCEUS_DISPATCH3(embedding_rows<T>)
  (tokens, static_cast<const T*>(weight), packed, static_cast<T*>(out), rows, vocab, width, first_row);
}

template <class T>
void backward(const int32_t* tokens, const void* dy, float* weight_grad, int64_t rows, int64_t vocab, int64_t width,
              int64_t first_row) {
  CADUCEUS_DISPATCH3(embedding_backward_rows<T>)
  (tokens, static_cast<const T*>(dy), weight_grad, rows, vocab, width, first_row);
}

}  // namespace

void check_token_ids(const int32_t* tokens, int64_t count, int64_t vocab) {
  for (int64_t i = 0; i < count; i++)
    if (tokens[i] < 0 || tokens[i] >= vocab)
      throw std::out_of_range("token id " + std::to_string(tokens[i]) + " at index " + std::to_string(i) +
                              " is outside the vocabulary of " + std::to_string(vocab) + " ids; pass ids in [0, " +
                              std::to_string(vocab) + ")");
}

void embedding(int dtype, const int32_t* tokens, const void* weight, bool packed, void* out, int64_t rows,
               int64_t vocab, int64_t width, int64_t first_row) {
  if (first_row == kWholeTable) check_token_ids(tokens, rows, vocab), first_row = 0;
  (dtype == kFloat32 ? forward<float> : forward<bf16>)(tokens, weight, packed, out, rows, vocab, width, first_row);
}

void embedding_backward(int dtype, const int32_t* tokens, const void* dy, float* weight_grad, int64_t rows,
                        int64_t vocab, int64_t width, int64_t first_row) {
  if (first_row == kWholeTable) first_row = 0;
  (dtype == kFloat32 ? backward<float> : backward<bf16>)(tokens, dy, weight_grad, rows, vocab, width, first_row);
}

}  // namespace caduceus
