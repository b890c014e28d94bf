#define ISA_FILE "adamw.inl"
#include "ops.h"
#include "foreach_isa.h"

namespace caduceus {
namespace {

template <class T>
void step_packed(const AdamWSettings& s, const float* grad, float* master, float* exp_avg, float* exp_avg_sq,
                 void* weight, int64_t rows, int64_t width) {
  CADUCEUS_DISPATCH3(adamw_packed<T>)(s, grad, master, exp_avg, exp_avg_sq, static_cast<T*>(weight), rows, width);
}

template <class T>
void step_dense(const AdamWSettings& s, const float* grad, float* master, float* exp_avg, float* exp_avg_sq,
                void* weight, int64_t rows, int64_t width) {
  CADUCEUS_DISPATCH3(adamw_dense<T>)(s, grad, master, exp_avg, exp_avg_sq, static_cast<T*>(weight), rows * width);
}

}  // namespace

void adamw(int dtype, bool packed, const AdamWSettings& settings, const float* grad, float* master, float* exp_avg,
           float* exp_avg_sq, void* weight, int64_t rows, int64_t width) {
  auto step = packed ? (dtype == kFloat32 ? step_packed<float> : step_packed<bf16>)
                     : (dtype == kFloat32 ? step_dense<float> : step_dense<bf16>);
  step(settings, grad, master, exp_avg, exp_avg_sq, weight, rows, width);
}

double squared_norm(const float* values, int64_t count) { return CADUCEUS_DISPATCH3(squared_norm_of)(values, count); }

}  // namespace caduceus
