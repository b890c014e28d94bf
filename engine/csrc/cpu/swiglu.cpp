#define ISA_FILE "swiglu.inl"
#include "foreach_isa.h"
#include "ops.h"

namespace caduceus {
namespace {

template <class T>
void forward(const void* gate_up, void* out, int64_t rows, int64_t width) {
  CADUCEUS_DISPATCH3(swiglu_rows<T>)(static_cast<const T*>(gate_up), static_cast<T*>(out), rows, width);
}

template <class T>
void backward(const void* dy, const void* gate_up, void* d_gate_up, int64_t rows, int64_t width) {
  CADUCEUS_DISPATCH3(swiglu_backward_rows<T>)
  (static_cast<const T*>(dy), static_cast<const T*>(gate_up), static_cast<T*>(d_gate_up), rows, width);
}

}  // namespace

void swiglu(int dtype, const void* gate_up, void* out, int64_t rows, int64_t width) {
  (dtype == kFloat32 ? forward<float> : forward<bf16>)(gate_up, out, rows, width);
}

void swiglu_backward(int dtype, const void* dy, const void* gate_up, void* d_gate_up, int64_t rows, int64_t width) {
  (dtype == kFloat32 ? backward<float> : backward<bf16>)(dy, gate_up, d_gate_up, rows, width);
}

}  // namespace caduceus
