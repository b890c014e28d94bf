#include "isa.h"

#include <atomic>
#include <stdexcept>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace caduceus {
namespace {

#if defined(__x86_64__) && defined(__linux__)
bool os_grants_amx() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(2): ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool cpu_has_amx_bf16() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  return (d >> 22 & 1) && (d >> 24 & 1);  // AMX-BF16, AMX-TILE
}

Isa detect() {
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) return kGeneric;
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")))
    return kAvx2;
  if (!__builtin_cpu_supports("avx512bf16")) return kAvx512;
  return cpu_has_amx_bf16() && os_grants_amx() ? kAmx : kAvx512Bf16;
}
#else
Isa detect() { return kGeneric; }
#endif

std::atomic<int> current{-1};
constexpr const char* kNames[] = {"generic", "avx2", "avx512", "avx512_bf16", "amx"};

}  // namespace

Isa best_isa() {
  static const Isa best = detect();
  return best;
}

Isa isa() {
  int now = current.load(std::memory_order_relaxed);
  if (now < 0) current.store(now = best_isa(), std::memory_order_relaxed);
  return static_cast<Isa>(now);
}

void set_isa(Isa wanted) {
  if (wanted > best_isa())
    throw std::invalid_argument(std::string("this machine has no ") + isa_name(wanted) + "; its best is " +
                                isa_name(best_isa()));
  current.store(wanted, std::memory_order_relaxed);
}

const char* isa_name(Isa wanted) { return kNames[wanted]; }

Isa isa_from_name(const std::string& name) {
  for (int i = 0; i <= kAmx; i++)
    if (name == kNames[i]) return static_cast<Isa>(i);
  throw std::invalid_argument("no instruction set is called " + name);
}

}  // namespace caduceus
