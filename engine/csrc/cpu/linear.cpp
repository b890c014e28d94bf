#include "ops.h"
#include "scratch.h"

#define ISA_MATRIX
#define ISA_FILE "linear.inl"
#include "foreach_isa.h"

namespace caduceus {

void linear(const LinearShape& shape, DType dtype, const void* x, int64_t x_stride, const void* weight,
            const void* bias, DType bias_dtype, void* out, DType out_dtype) {
  CADUCEUS_DISPATCH5(linear(shape, dtype, x, x_stride, weight, bias, bias_dtype, out, out_dtype));
}

void linear_grad_input(const LinearShape& shape, DType dtype, const void* dy, int64_t dy_stride, const void* weight,
                       void* dx) {
  CADUCEUS_DISPATCH5(linear_grad_input(shape, dtype, dy, dy_stride, weight, dx));
}

void linear_grad_weight(const LinearShape& shape, DType dtype, const void* dy, int64_t dy_stride, const void* x,
                        int64_t x_stride, float* grad) {
  CADUCEUS_DISPATCH5(linear_grad_weight(shape, dtype, dy, dy_stride, x, x_stride, grad));
}

void linear_grad_bias(const LinearShape& shape, DType dtype, const void* dy, int64_t dy_stride, float* grad) {
  CADUCEUS_DISPATCH5(linear_grad_bias(shape, dtype, dy, dy_stride, grad));
}

}  // namespace caduceus
