// How many float32 operations one core can do in a second: independent chains of multiply-adds in registers, of the
// widest vectors that this machine has. Built by machine.py for the machine it runs on.
#include <chrono>
#include <cstddef>

#if defined(__AVX512F__)
constexpr size_t kLanes = 16;
#elif defined(__AVX__)
constexpr size_t kLanes = 8;
#else
constexpr size_t kLanes = 4;
#endif
constexpr size_t kChains = 12;  // more than the latency of one times those started in a cycle

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));

extern "C" double gflops() {
  constexpr size_t kSteps = 1 << 22;
  Vec chain[kChains] = {}, factor = Vec{} + 0.5f;
  double best = 0;
  for (int round = 0; round < 5; ++round) {
    const auto began = std::chrono::steady_clock::now();
    for (size_t step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
      for (size_t i = 0; i < kChains; ++i) {
        chain[i] = chain[i] * factor + factor;
#if defined(__x86_64__)
        asm volatile("" : "+v"(chain[i]));  // each step is done, and in a register
#elif defined(__aarch64__)
        asm volatile("" : "+w"(chain[i]));
#endif
      }
    }
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - began;
    const double rate = 2.0 * kSteps * kChains * kLanes / taken.count() / 1e9;
    if (rate > best) best = rate;
  }
  return best;
}
