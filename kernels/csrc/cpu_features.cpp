// What the processor that this runs on can do.

#include "interface.h"
#include "simd.h"

#include <initializer_list>

#ifdef X86
#include <cpuid.h>
#endif
#if defined(ARM) && defined(__linux__)
#include <sys/auxv.h>
#endif
#if defined(ARM) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#ifdef MATRIX_UNIT
#include <sys/syscall.h>
#include <unistd.h>
#endif

using namespace gptq;

namespace {

#ifdef X86
struct Registers {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

// Nothing where the processor has no such leaf. By itself, since __builtin_cpu_supports needs a
// library of the compiler's that Windows' linkers do not look for.
Registers read_cpuid(unsigned leaf, unsigned part) {
  Registers of;
  if (!__get_cpuid_count(leaf, part, &of.a, &of.b, &of.c, &of.d)) return {};
  return of;
}

bool has(unsigned bits, std::initializer_list<int> all) {
  for (int bit : all)
    if (!(bits >> bit & 1)) return false;
  return true;
}

// The registers that the system keeps for each thread.
unsigned kept_registers() {
  if (!has(read_cpuid(1, 0).c, {27})) return 0;  // OSXSAVE
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

Isa find_isa() {
  const unsigned kept = kept_registers();
  const Registers first = read_cpuid(1, 0), wide = read_cpuid(7, 0);
  const bool avx2 =
      has(kept, {1, 2}) && has(first.c, {12, 28, 29}) && has(wide.b, {5});  // FMA, AVX, F16C
  if (!avx2) return PLAIN;
  // Registers of 64 bytes; F, DQ, BW and VL.
  if (!has(kept, {5, 6, 7}) || !has(wide.b, {16, 17, 30, 31}))
    return has(read_cpuid(7, 1).a, {4}) ? AVX_VNNI : AVX2;
  if (has(read_cpuid(7, 1).a, {5})) return AVX512_BF16;
  return has(wide.c, {11}) ? AVX512_VNNI : AVX512;
}
#endif

}  // namespace

namespace gptq {

#ifdef X86
Vnni256 find_vnni256() {
  static const Vnni256 found = [] {
    const Isa isa = find_isa();
    if (isa >= AVX2 && has(read_cpuid(7, 1).a, {4})) return Vnni256::VEX;
    const bool evex = isa >= AVX512 && has(read_cpuid(7, 0).c, {11});
    return evex ? Vnni256::EVEX : Vnni256::NONE;
  }();
  return found;
}
#endif

}  // namespace gptq

extern "C" {

int gptq_isa() {
#ifdef X86
  static const Isa isa = find_isa();
  return isa;
#elif defined(ARM) && defined(__linux__)
  constexpr unsigned long DOT_PRODUCTS = 1ul << 20;  // HWCAP_ASIMDDP
  constexpr unsigned long MATRICES = 1ul << 13;      // HWCAP2_I8MM
  if (!(getauxval(AT_HWCAP) & DOT_PRODUCTS)) return PLAIN;
  return getauxval(AT_HWCAP2) & MATRICES ? I8MM : DOTPROD;
#elif defined(ARM) && defined(__APPLE__)
  static const bool matrices = [] {  // since the M2; every Mac's has the other products
    int there = 0;
    size_t size = sizeof there;
    return sysctlbyname("hw.optional.arm.FEAT_I8MM", &there, &size, nullptr, 0) == 0 && there;
  }();
  return matrices ? I8MM : DOTPROD;
#else
  return PLAIN;
#endif
}

int gptq_activations(int isa) {
  // As fast as vdpbf16ps for a few rows, or faster, and nearer to x (docs/decisions/native-cpu.md).
#if defined(X86) || defined(ARM)
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
    const bool there = has(read_cpuid(7, 0).d, {22, 24});  // AMX-BF16, AMX-TILE
    return there && syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
  }();
  return usable;
#else
  return 0;
#endif
}

}  // extern "C"
