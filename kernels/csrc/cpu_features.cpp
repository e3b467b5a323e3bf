// What the processor that this runs on can do.

#include "interface.h"
#include "simd.h"

#ifdef MATRIX_UNIT
#include <sys/syscall.h>
#include <unistd.h>
#endif

using namespace gptq;

extern "C" {

int gptq_isa() {
#ifdef X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return __builtin_cpu_supports("avx512bf16")   ? AVX512_BF16
           : __builtin_cpu_supports("avx512vnni") ? AVX512_VNNI
                                                  : AVX512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
#endif
  return PLAIN;
}

int gptq_activations(int isa) {
#ifdef X86
  // Where there is a matrix unit for bfloat16, vdpbf16ps is slow (docs/decisions/native-cpu.md).
  if (isa == AVX512_BF16 && !gptq_amx()) return int(Activations::BF16);
  if (isa >= AVX2) return int(Activations::INT16);
#endif
  (void)isa;
  return int(Activations::FLOAT32);
}

int gptq_amx() {
#ifdef MATRIX_UNIT
  static const bool usable = [] {
    // ARCH_REQ_XCOMP_PERM: the system must let this process use it; threads made later have it too.
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;
    unsigned a = 7, b = 0, c = 0, d = 0;
    __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    const bool there = (d >> 22 & 1) && (d >> 24 & 1);  // AMX-BF16, AMX-TILE
    return there && syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
  }();
  return usable;
#else
  return 0;
#endif
}

}  // extern "C"
