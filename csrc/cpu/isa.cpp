#include "cpu/isa.h"

#include <atomic>
#include <initializer_list>

namespace trackstar {

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
    default:
      return false;
  }
}

static Isa best_isa() {
  for (Isa level : {Isa::v4_bf16, Isa::v4_vnni, Isa::v4, Isa::v3_vnni, Isa::v3}) {
    if (isa_available(level)) return level;
  }
  return Isa::baseline;
}

static std::atomic<Isa>& current() {
  static std::atomic<Isa> level{best_isa()};
  return level;
}

Isa isa() { return current().load(std::memory_order_relaxed); }
void set_isa(Isa level) { current().store(level, std::memory_order_relaxed); }

}  // namespace trackstar
