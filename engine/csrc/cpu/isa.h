// The instruction sets a kernel is compiled for, and the one chosen at run time.
//
// A kernel file `op.cpp` names its body once (`#define ISA_FILE "op.inl"`) and includes foreach_isa.h, which compiles
// the body into one namespace per instruction set. CADUCEUS_DISPATCH then calls the one the machine has.
// Bits are the same for any batch on one machine; different instruction sets may differ from each other.
#pragma once
#include <string>

namespace caduceus {

enum Isa : int { kGeneric = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };

Isa isa();                    // the one in use
Isa best_isa();               // the best this machine has
void set_isa(Isa isa);        // tests walk through all of them; throws std::invalid_argument above best_isa()
const char* isa_name(Isa isa);
Isa isa_from_name(const std::string& name);

}  // namespace caduceus

// Bodies with three variants (row operations) and with five (matmul, attention).
#define CADUCEUS_DISPATCH3(fn)                                               \
  (::caduceus::isa() >= ::caduceus::kAvx512 ? ::caduceus::avx512::fn         \
   : ::caduceus::isa() == ::caduceus::kAvx2 ? ::caduceus::avx2::fn           \
                                            : ::caduceus::generic::fn)
#define CADUCEUS_DISPATCH5(fn)                                               \
  (::caduceus::isa() == ::caduceus::kAmx          ? ::caduceus::amx::fn      \
   : ::caduceus::isa() == ::caduceus::kAvx512Bf16 ? ::caduceus::avx512_bf16::fn \
   : ::caduceus::isa() == ::caduceus::kAvx512     ? ::caduceus::avx512::fn   \
   : ::caduceus::isa() == ::caduceus::kAvx2       ? ::caduceus::avx2::fn     \
                                                  : ::caduceus::generic::fn)
