// The three products of a linear layer, y = x W^T + b:
//   forward   y  [T, N]  = x  [T, K]  W^T      panels are the weight's own
//   backward  dx [T, K]  = dy [T, N]  W        panels are W transposed, block by block, into scratch
//             dW [N, K] += dy^T [N, T] x       panels are x, block by block, in scratch

namespace {

#include "gemm.inl"
#include "gemm_pack.inl"
#include "gemm_vector.inl"
#if ISA_LEVEL >= 4
#include "gemm_tile.inl"
#endif

#if ISA_LEVEL >= 4
template <class T>
using Kernel = std::conditional_t<sizeof(T) == 2, TileKernel, VectorKernel<T>>;
#else
template <class T>
using Kernel = VectorKernel<T>;
#endif

constexpr int64_t kPanelScratchBytes = 8 << 20;  // of transposed weights or packed activations at a time
constexpr int64_t kTokenBlock = 2048;

template <class T>
void linear_typed(const LinearShape& s, const T* x, int64_t x_stride, const T* weight, const void* bias,
                  DType bias_dtype, void* out, DType out_dtype) {
  gemm<Kernel<T>>(Gemm<T>{x, x_stride, false, s.tokens, s.columns, s.depth, weight,
                          round_up(s.depth, kPair<T>) * kLanes, nullptr, 0, bias, bias_dtype, out, out_dtype,
                          s.columns});
}

template <class T>
void grad_input_typed(const LinearShape& s, const T* dy, int64_t dy_stride, const T* weight, T* dx) {
  int64_t weight_stride = round_up(s.depth, kPair<T>) * kLanes;
  int64_t block = std::max<int64_t>(32, kPanelScratchBytes / int64_t(sizeof(T)) / round_up(s.depth, 32) / 32 * 32);
  int64_t num_blocks = ceil_div(s.columns, block);
  block = round_up(ceil_div(s.columns, num_blocks), 32);
  DType dtype = sizeof(T) == 2 ? kBFloat16 : kFloat32;
  float* sums = nullptr;  // dx in fp32 between the blocks; fp32 keeps it in dx itself
  if (num_blocks > 1)
    sums = sizeof(T) == 4 ? reinterpret_cast<float*>(dx)
                          : static_cast<float*>(scratch(Scratch::kSums, s.tokens * s.depth * sizeof(float)));
  T* panels = static_cast<T*>(scratch(Scratch::kPanels, round_up(s.depth, 32) * block * sizeof(T)));
  constexpr int64_t kStep = kLanes * kPair<T>;
  for (int64_t n = 0; n < s.columns; n += block) {
    int64_t depth = std::min(block, s.columns - n);
    int64_t stride = round_up(depth, kLanes) * kLanes;
    parallel_for(ceil_div(s.depth, kStep), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++)
        transpose_panels(panels + i * kPair<T> * stride, stride, weight + n / kLanes * weight_stride, weight_stride,
                         ceil_div(depth, kLanes), i * kStep, s.depth);
    });
    bool last = n + depth == s.columns;
    void* out = last ? static_cast<void*>(dx) : sums;
    gemm<Kernel<T>>(Gemm<T>{dy + n, dy_stride, false, s.tokens, s.depth, depth, panels, stride, n ? sums : nullptr,
                            s.depth, nullptr, kFloat32, out, last ? dtype : kFloat32, s.depth});
  }
}

template <class T>
void grad_weight_typed(const LinearShape& s, const T* dy, int64_t dy_stride, const T* x, int64_t x_stride,
                       float* grad) {
  int64_t block = std::min(kTokenBlock, round_up(s.tokens, 32));
  T* panels = static_cast<T*>(scratch(Scratch::kPanels, round_up(s.depth, kLanes) * block * sizeof(T)));
  for (int64_t t = 0; t < s.tokens; t += block) {
    int64_t tokens = std::min(block, s.tokens - t);
    int64_t stride = round_up(tokens, kPair<T>) * kLanes;
    parallel_for(ceil_div(s.depth, kLanes), 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; p++)
        pack_panel(panels + p * stride, x + t * x_stride, x_stride, p * kLanes, s.depth, tokens);
    });
    gemm<Kernel<T>>(Gemm<T>{dy + t * dy_stride, dy_stride, true, s.columns, s.depth, tokens, panels, stride, grad,
                            s.depth, nullptr, kFloat32, grad, kFloat32, s.depth});
  }
}

template <class T>
void grad_bias_typed(const LinearShape& s, const T* dy, int64_t dy_stride, float* grad) {
  parallel_for(ceil_div(s.columns, kLanes), 4, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; p++) {
      int64_t column = p * kLanes;
      int n = int(std::min<int64_t>(kLanes, s.columns - column));
      f32x16 sum = n == kLanes ? load(grad + column) : load_n(grad + column, n);
      for (int64_t t = 0; t < s.tokens; t++) {
        const T* row = dy + t * dy_stride + column;
        sum = sum + (n == kLanes ? load(row) : load_n(row, n));
      }
      if (n == kLanes)
        store(grad + column, sum);
      else
        store_n(grad + column, sum, n);
    }
  });
}

}  // namespace

void linear(const LinearShape& s, DType dtype, const void* x, int64_t x_stride, const void* weight, const void* bias,
            DType bias_dtype, void* out, DType out_dtype) {
  if (dtype == kFloat32)
    linear_typed(s, static_cast<const float*>(x), x_stride, static_cast<const float*>(weight), bias, bias_dtype, out,
                 out_dtype);
  else
    linear_typed(s, static_cast<const bf16*>(x), x_stride, static_cast<const bf16*>(weight), bias, bias_dtype, out,
                 out_dtype);
}

void linear_grad_input(const LinearShape& s, DType dtype, const void* dy, int64_t dy_stride, const void* weight,
                       void* dx) {
  if (dtype == kFloat32)
    grad_input_typed(s, static_cast<const float*>(dy), dy_stride, static_cast<const float*>(weight),
                     static_cast<float*>(dx));
  else
    grad_input_typed(s, static_cast<const bf16*>(dy), dy_stride, static_cast<const bf16*>(weight),
                     static_cast<bf16*>(dx));
}

void linear_grad_weight(const LinearShape& s, DType dtype, const void* dy, int64_t dy_stride, const void* x,
                        int64_t x_stride, float* grad) {
  if (dtype == kFloat32)
    grad_weight_typed(s, static_cast<const float*>(dy), dy_stride, static_cast<const float*>(x), x_stride, grad);
  else
    grad_weight_typed(s, static_cast<const bf16*>(dy), dy_stride, static_cast<const bf16*>(x), x_stride, grad);
}

void linear_grad_bias(const LinearShape& s, DType dtype, const void* dy, int64_t dy_stride, float* grad) {
  if (dtype == kFloat32)
    grad_bias_typed(s, static_cast<const float*>(dy), dy_stride, grad);
  else
    grad_bias_typed(s, static_cast<const bf16*>(dy), dy_stride, grad);
}
