// CUDA's threads on a CPU, to run csrc/cuda with an ordinary compiler and to fail where a GPU might.
//
// The threads of a block are fibers of one OS thread, run one block after the other. A fiber runs until it has to
// wait for others, at a barrier or where its whole warp does something together; then the next one is chosen: the
// lowest lane of the same warp, so that warps are as far apart as barriers allow, or any thread at random if
// SIMT_SEED is set. ThreadSanitizer is told of barriers alone: nothing else orders memory here, shuffles and votes
// included. Shared memory is new for each block, of the size asked for, and filled with NaN.
//
// A barrier that some threads do not reach, lanes of a warp at different operations, and blocks larger than a GPU
// takes are errors. What it does not know: races between blocks, bank conflicts, time.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define SIMT_UNSEEN __attribute__((no_sanitize("thread"), noinline))
#else
#define SIMT_UNSEEN
#endif

// simt_switch(&from, to): saves what a call must keep on the stack, stores the stack's address, and goes on at
// another such address.
extern "C" void simt_switch(void** from, void* to);
asm(R"(
.text
.weak simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace simt {

constexpr int kWarpSize = 32, kMostThreads = 1024;
constexpr size_t kMostShared = 227 * 1024, kStack = 128 * 1024;

// A copy to shared memory that has not landed.
struct Copy {
  unsigned char* to;
  const unsigned char* from;
  bool taken;
};

enum class State { ready, at_barrier, in_warp, finished };

struct Thread {
  void* stack;
  void* top = nullptr;  // where it goes on
  State state = State::ready;
  dim3 index;
  std::vector<Copy> copies;
  std::vector<std::vector<Copy>> groups;
  // What it does together with its warp: which operation, and its operands and result.
  const void* operation = nullptr;
  void* operands = nullptr;
  unsigned barriers = 0, warp_barriers = 0;
  void* fiber = nullptr;       // ThreadSanitizer's
  void* fake_stack = nullptr;  // AddressSanitizer's
};

struct Block {
  dim3 grid, index;
  std::vector<Thread> threads;
  std::vector<unsigned> ready;  // lanes of each warp
  std::vector<int> waiting;     // lanes of each warp that are in a warp's operation
  int at_barrier = 0, finished = 0, current = 0;
  unsigned char* shared = nullptr;
  std::function<void()> body;
  std::exception_ptr error;
  std::unique_ptr<std::mt19937> random;
  void* scheduler = nullptr;
  void* scheduler_fiber = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
  // ThreadSanitizer's names of what orders memory.
  char launch, end, barrier[2], warp_barrier[kMostThreads / kWarpSize][2];

  SIMT_UNSEEN Thread& thread() { return threads[current]; }
  SIMT_UNSEEN int warp() const { return current / kWarpSize; }
  SIMT_UNSEEN int lane() const { return current % kWarpSize; }
  SIMT_UNSEEN void wake(int thread) {
    threads[thread].state = State::ready;
    ready[thread / kWarpSize] |= 1u << thread % kWarpSize;
  }
};

inline Block*& block() {
  static thread_local Block* running = nullptr;
  return running;
}

// ---- Switching ---------------------------------------------------------------------------------------------

SIMT_UNSEEN inline void to_scheduler() {
  Block& b = *block();
  Thread& thread = b.thread();
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(b.scheduler_fiber, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(thread.state == State::finished ? nullptr : &thread.fake_stack,
                                 b.scheduler_stack, b.scheduler_stack_size);
#endif
  simt_switch(&thread.top, b.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(thread.fake_stack, &b.scheduler_stack, &b.scheduler_stack_size);
#endif
}

SIMT_UNSEEN inline void to_thread(Block& b, int next) {
  b.current = next;
  Thread& thread = b.thread();
  b.ready[b.warp()] &= ~(1u << b.lane());
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(thread.fiber, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack;
  __sanitizer_start_switch_fiber(&fake_stack, thread.stack, kStack);
#endif
  simt_switch(&b.scheduler, thread.top);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

// Everything before the one happens before everything after the other. A barrier has two names by turns: a thread
// that has reached the next one must not seem ordered before one that has just left this.
inline void order_before([[maybe_unused]] void* name) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(name);
#endif
}
inline void order_after([[maybe_unused]] void* name) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(name);
#endif
}

// Where a thread begins.
SIMT_UNSEEN inline void enter() {
  Block& b = *block();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &b.scheduler_stack, &b.scheduler_stack_size);
#endif
  order_after(&b.launch);
  try {
    b.body();
  } catch (...) {
    b.error = std::current_exception();
  }
  order_before(&b.end);
  b.thread().state = State::finished;
  ++b.finished;
  to_scheduler();
}

// ---- Waiting for each other --------------------------------------------------------------------------------

SIMT_UNSEEN inline void barrier() {
  Block& b = *block();
  char* name = &b.barrier[b.thread().barriers++ % 2];
  order_before(name);
  b.thread().state = State::at_barrier;
  if (++b.at_barrier == static_cast<int>(b.threads.size())) {
    b.at_barrier = 0;
    for (size_t i = 0; i < b.threads.size(); ++i) b.wake(static_cast<int>(i));
  }
  to_scheduler();
  order_after(name);
}

// Lanes of a warp, by their operands, of which the last to come runs `run` for all of them. It stands for hardware:
// sanitizers do not see what it does.
template <typename Operands>
using Lanes = Operands* const (&)[kWarpSize];
template <typename Operands>
SIMT_UNSEEN void together(void (*run)(Lanes<Operands>), Operands& operands) {
  Block& b = *block();
  Thread& own = b.thread();
  const int first = b.warp() * kWarpSize;
  own.operation = reinterpret_cast<const void*>(run);
  own.operands = &operands;
  own.state = State::in_warp;
  if (++b.waiting[b.warp()] == kWarpSize) {
    Operands* lanes[kWarpSize];
    for (int i = 0; i < kWarpSize; ++i) {
      Thread& other = b.threads[first + i];
      if (other.operation != own.operation)
        throw std::runtime_error("lanes of a warp are at different operations");
      lanes[i] = static_cast<Operands*>(other.operands);
    }
    b.waiting[b.warp()] = 0;
    run(lanes);
    for (int i = 0; i < kWarpSize; ++i) b.wake(first + i);
    if (!b.random) {  // goes on at once
      own.state = State::ready;
      b.ready[b.warp()] &= ~(1u << b.lane());
      return;
    }
  }
  to_scheduler();
}

// ---- Blocks and grids --------------------------------------------------------------------------------------

SIMT_UNSEEN inline int choose(Block& b) {
  const int warps = static_cast<int>(b.ready.size());
  const int first = b.random ? static_cast<int>((*b.random)() % warps) : b.warp();
  for (int i = 0; i < warps; ++i) {
    const int warp = (first + i) % warps;
    unsigned lanes = b.ready[warp];
    if (lanes == 0) continue;
    for (unsigned skip = b.random ? (*b.random)() % __builtin_popcount(lanes) : 0; skip > 0; --skip) {
      lanes &= lanes - 1;
    }
    return warp * kWarpSize + __builtin_ctz(lanes);
  }
  throw std::runtime_error("deadlock: threads wait for others that wait elsewhere or have finished");
}

SIMT_UNSEEN inline void run_block(Block& b) {
  const int threads = static_cast<int>(b.threads.size());
  b.ready.assign(threads / kWarpSize, 0);
  b.waiting.assign(threads / kWarpSize, 0);
  b.at_barrier = b.finished = b.current = 0;
  for (int i = 0; i < threads; ++i) {
    Thread& thread = b.threads[i];
    void* stack = thread.stack;
    thread = Thread{};
    thread.stack = stack;
    thread.index = {static_cast<unsigned>(i), 0, 0};
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack, kStack);  // of functions that never returned
#endif
    // As simt_switch leaves a stack: six registers, where to return to, and what that returns to, which it never does.
    void** top = reinterpret_cast<void**>(static_cast<char*>(stack) + kStack) - 8;
    std::fill(top, top + 8, nullptr);
    top[6] = reinterpret_cast<void*>(enter);
    thread.top = top;
#if defined(__SANITIZE_THREAD__)
    thread.fiber = __tsan_create_fiber(0);
#endif
    b.wake(i);
  }
#if defined(__SANITIZE_THREAD__)
  b.scheduler_fiber = __tsan_get_current_fiber();
#endif
  order_before(&b.launch);
  while (b.finished < threads && !b.error) to_thread(b, choose(b));
  order_after(&b.end);
#if defined(__SANITIZE_THREAD__)
  for (Thread& thread : b.threads) __tsan_destroy_fiber(thread.fiber);
#endif
  if (b.error) std::rethrow_exception(b.error);
}

template <typename Body>
void launch(Body body, dim3 grid, int threads, size_t shared_bytes) {
  if (threads < 1 || threads > kMostThreads || threads % kWarpSize != 0) {
    throw std::runtime_error("blocks of " + std::to_string(threads) + " threads");
  }
  if (shared_bytes > kMostShared)
    throw std::runtime_error(std::to_string(shared_bytes) + " bytes of shared memory");
  Block b;
  b.grid = grid;
  b.body = body;
  b.threads.resize(threads);
  if (const char* seed = std::getenv("SIMT_SEED")) b.random = std::make_unique<std::mt19937>(std::atoi(seed));
  const size_t stacks_size = kStack * threads;
  void* stacks =
      mmap(nullptr, stacks_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) throw std::bad_alloc();
  for (int i = 0; i < threads; ++i) b.threads[i].stack = static_cast<char*>(stacks) + kStack * i;
  Block* outer = block();
  block() = &b;
  std::exception_ptr error;
  try {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        const std::unique_ptr<unsigned char, decltype(&std::free)> shared(
            static_cast<unsigned char*>(std::aligned_alloc(128, (shared_bytes + 127) / 128 * 128)),
            std::free);
        std::memset(shared.get(), 0xFF, shared_bytes);
        b.shared = shared.get();
        b.index = {x, y, 0};
        run_block(b);
      }
    }
  } catch (...) {
    error = std::current_exception();
  }
  block() = outer;
  munmap(stacks, stacks_size);
  if (error) std::rethrow_exception(error);
}

}  // namespace simt
