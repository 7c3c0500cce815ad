#include "cpu/isa.h"

#include <atomic>
#include <initializer_list>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#ifdef TRACKSTAR_HAS_amx
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace trackstar {

#ifdef TRACKSTAR_HAS_amx
// Whether there are tiles of bytes and the system lets this process use them, for which it wants to be asked: a thread's
// state becomes 8 KB larger.
static bool tiles_permitted() {
  static const bool permitted = [] {
    constexpr unsigned kTiles = 1u << 24, kTilesOfBytes = 1u << 25;  // CPUID leaf 7, edx
    constexpr long kRequest = 0x1023;                                // ARCH_REQ_XCOMP_PERM
    constexpr long kTileData = 18;                                   // that part of the state
    unsigned eax, ebx, ecx, edx = 0;
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx & kTiles) != 0 &&
           (edx & kTilesOfBytes) != 0 && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  }();
  return permitted;
}
#endif

bool isa_available(Isa level) {
  switch (level) {
    case Isa::baseline:
      return true;
#ifdef TRACKSTAR_HAS_v3
    case Isa::v3:
      return __builtin_cpu_supports("x86-64-v3");
#endif
#ifdef TRACKSTAR_HAS_v3_vnni
    case Isa::v3_vnni:
      return __builtin_cpu_supports("x86-64-v3") && __builtin_cpu_supports("avxvnni");
#endif
#ifdef TRACKSTAR_HAS_v4
    case Isa::v4:
      return __builtin_cpu_supports("x86-64-v4");
#endif
#ifdef TRACKSTAR_HAS_v4_vnni
    case Isa::v4_vnni:
      return __builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512vnni") &&
             __builtin_cpu_supports("avx512vbmi");
#endif
#ifdef TRACKSTAR_HAS_v4_bf16
    case Isa::v4_bf16:
      return __builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512bf16");
#endif
#ifdef TRACKSTAR_HAS_amx
    case Isa::amx:
      return isa_available(Isa::v4_vnni) && isa_available(Isa::v4_bf16) && tiles_permitted();
#endif
    default:
      return false;
  }
}

static Isa best_isa() {
  for (Isa level : {Isa::amx, Isa::v4_bf16, Isa::v4_vnni, Isa::v4, Isa::v3_vnni, Isa::v3}) {
    if (isa_available(level)) return level;
  }
  return Isa::baseline;
}

static std::atomic<Isa>& current() {
  static std::atomic<Isa> level{best_isa()};
  return level;
}

bool is_zen5() {
#if defined(__x86_64__)
  static const bool found = [] {
    unsigned eax = 0, ebx, ecx, edx;
    const bool known = __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && __builtin_cpu_is("amd");
    const unsigned family = (eax >> 8 & 0xF) + (eax >> 20 & 0xFF);
    return known && family == 0x1A;
  }();
  return found;
#else
  return false;
#endif
}

bool is_intel() {
#if defined(__x86_64__)
  return __builtin_cpu_is("intel") != 0;
#else
  return false;
#endif
}

Isa isa() { return current().load(std::memory_order_relaxed); }
void set_isa(Isa level) { current().store(level, std::memory_order_relaxed); }

}  // namespace trackstar
