// Work shared among the threads of torch's own OpenMP pool.
//
// The libraries here link no OpenMP runtime: a second pool beside torch's spins against it (1.7-2 times slower after a
// GEMM). The caller hands over GOMP_parallel, found in the runtime that torch has loaded; without it one thread works.
#pragma once

#include <atomic>
#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

using ParallelRegion = void (*)(void (*work)(void*), void* data, unsigned num_threads, unsigned flags);
extern ParallelRegion parallel_region;

// Numbers below 1e-38 are taken as 0 while this lives: a state that decays would otherwise end up in them, where each
// operation costs a hundred times more on many processors.
class FlushTinyNumbers {
  public:
#if defined(__x86_64__)
    FlushTinyNumbers() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
    ~FlushTinyNumbers() { _mm_setcsr(before_); }

  private:
    unsigned before_;
#elif defined(__aarch64__)
    FlushTinyNumbers() {
        asm volatile("mrs %0, fpcr" : "=r"(before_));
        asm volatile("msr fpcr, %0" : : "r"(before_ | (uint64_t(1) << 24)));
    }
    ~FlushTinyNumbers() { asm volatile("msr fpcr, %0" : : "r"(before_)); }

  private:
    uint64_t before_;
#endif
};

// `num_threads`, or one for work so small that waking the others costs more: below about 50 microseconds.
inline int64_t threads_worth(int64_t state_updates, int64_t num_threads) {
    return state_updates < (1 << 18) ? 1 : num_threads;
}

// Calls make_worker() once per thread and its result with each of 0 .. num_items - 1 on one thread or another. Results
// must not depend on which: items write apart from each other.
template <class MakeWorker>
void share(int64_t num_items, int64_t num_threads, const MakeWorker& make_worker) {
    struct Job {
        const MakeWorker* make_worker;
        int64_t num_items;
        std::atomic<int64_t> next{0};
    } job{&make_worker, num_items};
    auto work = [](void* data) {
        Job& job = *static_cast<Job*>(data);
        FlushTinyNumbers flush;
        auto worker = (*job.make_worker)();
        for (int64_t item; (item = job.next.fetch_add(1, std::memory_order_relaxed)) < job.num_items;)
            worker(item);
    };
    // All of torch's threads or one: libgomp ends the threads that a smaller region leaves over.
    if (parallel_region && num_threads > 1 && num_items > 1)
        parallel_region(work, &job, unsigned(num_threads), 0);
    else
        work(&job);
}
