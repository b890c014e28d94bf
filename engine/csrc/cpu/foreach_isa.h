// Compiles ISA_FILE into one namespace per instruction set: caduceus::generic, ::avx2, ::avx512 and, when ISA_MATRIX
// is defined, ::avx512_bf16 and ::amx. System headers come first, outside every target region, so that no inline
// function of the standard library is compiled for an instruction set the machine may lack.
#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <vector>
#if defined(__x86_64__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 says it of its own _mm512_undefined_*
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "common.h"
#include "isa.h"
#include "parallel.h"

#define ISA_LEVEL 0
namespace caduceus::generic {
#include "simd.h"
#include ISA_FILE
}  // namespace caduceus::generic
#undef ISA_LEVEL

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define ISA_LEVEL 1
namespace caduceus::avx2 {
#include "simd.h"
#include ISA_FILE
}  // namespace caduceus::avx2
#undef ISA_LEVEL
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
#define ISA_LEVEL 2
namespace caduceus::avx512 {
#include "simd.h"
#include ISA_FILE
}  // namespace caduceus::avx512
#undef ISA_LEVEL
#pragma GCC pop_options

#ifdef ISA_MATRIX
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,prefer-vector-width=512")
#define ISA_LEVEL 3
namespace caduceus::avx512_bf16 {
#include "simd.h"
#include ISA_FILE
}  // namespace caduceus::avx512_bf16
#undef ISA_LEVEL
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16,prefer-vector-width=512")
#define ISA_LEVEL 4
namespace caduceus::amx {
#include "simd.h"
#include ISA_FILE
}  // namespace caduceus::amx
#undef ISA_LEVEL
#pragma GCC pop_options
#endif

#else  // other processors: every level is the generic code, so that the dispatch tables link
namespace caduceus {
namespace avx2 = generic;
namespace avx512 = generic;
namespace avx512_bf16 = generic;
namespace amx = generic;
}  // namespace caduceus
#endif
