// What one core can do at most, in the widest vectors that this machine has. Built by machine.py for the machine it
// runs on.
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

// Float32 operations in a second: independent chains of multiply-adds in registers.
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

// Reads `bytes`, a multiple of kStreams cache lines, in as many streams at once.
template <size_t kStreams>
void read(const char* from, size_t bytes) {
  typedef long long Line __attribute__((vector_size(64), aligned(16), may_alias));
  Line sum[kStreams] = {};
  const size_t part = bytes / kStreams;
  for (size_t i = 0; i < part; i += 64) {
#pragma GCC unroll 8
    for (size_t s = 0; s < kStreams; ++s) sum[s] += *reinterpret_cast<const Line*>(from + s * part + i);
  }
  for (Line& line : sum) asm volatile("" : : "m"(line));
}

// Reads as rows of `row_bytes` are read by a dot product: so many at once, each of them from start to end.
extern "C" void read_rows(const char* from, size_t rows, size_t row_bytes, int streams) {
  for (size_t row = 0; row + streams <= rows; row += streams) {
    const char* block = from + row * row_bytes;
    if (streams == 8) read<8>(block, 8 * row_bytes);
    if (streams == 4) read<4>(block, 4 * row_bytes);
    if (streams == 1) read<1>(block, row_bytes);
  }
}
