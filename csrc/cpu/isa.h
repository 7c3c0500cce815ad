// Which instruction set the CPU micro-kernels run with.
//
// Every micro-kernel source is compiled once per level into namespace trackstar::<level>; the level is
// chosen once, the best that the machine has, and tests may lower it to run the others.
#pragma once

namespace trackstar {

// x86-64 levels v3 and v4, each also with VNNI (and VBMI for v4), v4 with AVX512-BF16, and v4 with all of these and AMX;
// the baseline of aarch64 has NEON.
enum class Isa { baseline, v3, v3_vnni, v4, v4_vnni, v4_bf16, amx };

// The level in force.
Isa isa();

// Whose processor this is: at equal levels they like other kernels, and rows fetched in another order.
bool is_zen5();
bool is_intel();

// Whether this build contains `level` and this machine can run it.
bool isa_available(Isa level);

// Puts `level` in force. The caller has checked isa_available(level).
void set_isa(Isa level);

}  // namespace trackstar
