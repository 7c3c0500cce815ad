// OpenMP as far as csrc uses it, on std::thread: ThreadSanitizer knows nothing of what GCC's own threads wait for.
//
// Loops hand out their turns without ordering what threads do before and after, so that only barriers excuse a race.
#include <atomic>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace {

struct Loop {
  explicit Loop(long start) : next(start) {}
  std::atomic<long> next;
  long end = 0, step = 1;
};

class Team {
 public:
  explicit Team(unsigned size) : size(size) {}

  void barrier() {
    std::unique_lock<std::mutex> lock(mutex_);
    const unsigned long phase = phase_;
    if (++arrived_ == size) {
      arrived_ = 0;
      ++phase_;
      all_here_.notify_all();
    } else {
      all_here_.wait(lock, [&] { return phase != phase_; });
    }
  }

  // The loop that every thread meets as its `number`th.
  Loop* loop(unsigned long number, long start, long end, long step) {
    std::lock_guard<std::mutex> lock(mutex_);
    std::unique_ptr<Loop>& loop = loops_[number];
    if (!loop) {
      loop = std::make_unique<Loop>(start);
      loop->end = end;
      loop->step = step;
    }
    return loop.get();
  }

  const unsigned size;

 private:
  std::mutex mutex_;
  std::condition_variable all_here_;
  unsigned arrived_ = 0;
  unsigned long phase_ = 0;
  std::map<unsigned long, std::unique_ptr<Loop>> loops_;
};

// What a thread is in.
struct Member {
  Team* team = nullptr;
  unsigned number = 0;
  unsigned long loops = 0;
  Loop* loop = nullptr;
};
thread_local Member member;

bool next_turn(long* begin, long* end) {
  Loop& loop = *member.loop;
  *begin = loop.next.fetch_add(loop.step, std::memory_order_relaxed);
  if (*begin >= loop.end) return false;
  *end = *begin + loop.step < loop.end ? *begin + loop.step : loop.end;
  return true;
}

bool first_turn(long start, long end, long increment, long chunk, long* first, long* last) {
  member.loop = member.team->loop(member.loops++, start, end, increment * chunk);
  return next_turn(first, last);
}

}  // namespace

extern "C" {

void GOMP_parallel(void (*body)(void*), void* arguments, unsigned threads, unsigned) {
  Team team(threads);
  const auto run = [&](unsigned number) {
    member = {&team, number, 0, nullptr};
    body(arguments);
    member = {};
  };
  std::vector<std::thread> others;
  for (unsigned i = 1; i < threads; ++i) others.emplace_back(run, i);
  run(0);
  for (std::thread& thread : others) thread.join();
}

bool GOMP_loop_dynamic_start(long start, long end, long increment, long chunk, long* first, long* last) {
  return first_turn(start, end, increment, chunk, first, last);
}
bool GOMP_loop_nonmonotonic_dynamic_start(long start, long end, long increment, long chunk, long* first,
                                          long* last) {
  return first_turn(start, end, increment, chunk, first, last);
}
bool GOMP_loop_dynamic_next(long* first, long* last) { return next_turn(first, last); }
bool GOMP_loop_nonmonotonic_dynamic_next(long* first, long* last) { return next_turn(first, last); }
void GOMP_loop_end() { member.team->barrier(); }
void GOMP_loop_end_nowait() {}

int omp_get_thread_num() { return static_cast<int>(member.number); }
int omp_get_num_threads() { return member.team ? static_cast<int>(member.team->size) : 1; }
}
