#define ISA_FILE "rms_norm.inl"
#include "foreach_isa.h"
#include "ops.h"

namespace caduceus {
namespace {

template <class T>
void forward(const void* x, const void* delta, const void* weight, void* sum, void* out, float* rstd, int64_t rows,
             int64_t width, float eps) {
  CADUCEUS_DISPATCH3(rms_norm_rows<T>)
  (static_cast<const T*>(x), static_cast<const T*>(delta), static_cast<const T*>(weight), static_cast<T*>(sum),
   static_cast<T*>(out), rstd, rows, width, eps);
}

template <class T>
void backward(const void* dy, const void* d_sum, const void* x, const void* weight, const float* rstd, void* dx,
              float* weight_grad, int64_t rows, int64_t width) {
  CADUCEUS_DISPATCH3(rms_norm_backward_rows<T>)
  (static_cast<const T*>(dy), static_cast<const T*>(d_sum), static_cast<const T*>(x), static_cast<const T*>(weight),
   rstd, static_cast<T*>(dx), weight_grad, rows, width);
}

}  // namespace

void rms_norm(int dtype, const void* x, const void* delta, const void* weight, void* sum, void* out, float* rstd,
              int64_t rows, int64_t width, float eps) {
  (dtype == kFloat32 ? forward<float> : forward<bf16>)(x, delta, weight, sum, out, rstd, rows, width, eps);
}

void rms_norm_backward(int dtype, const void* dy, const void* d_sum, const void* x, const void* weight,
                       const float* rstd, void* dx, float* weight_grad, int64_t rows, int64_t width) {
  (dtype == kFloat32 ? backward<float> : backward<bf16>)(dy, d_sum, x, weight, rstd, dx, weight_grad, rows, width);
}

}  // namespace caduceus
