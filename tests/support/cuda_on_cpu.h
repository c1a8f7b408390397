// Stands in for kernels/cuda/intrinsics.cuh where the kernels are compiled by a C++ compiler: a block's threads are
// fibers, taken in turn up to the next point where they wait for each other. What a GPU would leave undefined (threads
// of a warp at different points, shared memory that nobody has written) is an error here, or a NaN.
#pragma once

#include <ucontext.h>

#include <cfenv>
#include <cmath>
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define DEVICE inline __attribute__((always_inline))
#define KERNEL(blocks) static void
#define ARGUMENTS const

constexpr int WARP = 32;

namespace fibers {

enum Wait { RUNNING, AT_BLOCK, AT_WARP, DONE };

struct Fiber {
    ucontext_t start;
    jmp_buf here;
    Wait wait;
    bool started;
    std::vector<char> stack;
};

inline Fiber all[THREADS];
inline ucontext_t scheduler_start;
inline jmp_buf scheduler;
inline int current;
inline long long block;
inline std::vector<char> shared;
inline float exchanged[2][THREADS];  // by turns: a thread may run ahead to the next exchange, no farther
inline bool said[2][THREADS];
inline int turn[THREADS];
inline void (*kernel)(const void*);
inline const void* arguments;

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "kernel on CPU: %s (block %lld, thread %d)\n", what, block, current);
    std::abort();
}

inline __attribute__((noinline)) void wait(Wait at) {
    all[current].wait = at;
    if (!_setjmp(all[current].here)) _longjmp(scheduler, 1);
}

inline void main_of_fiber() {
    kernel(arguments);
    wait(DONE);
}

inline __attribute__((noinline)) void resume(int index) {
    Fiber& fiber = all[index];
    current = index;
    fiber.wait = RUNNING;
    if (_setjmp(scheduler)) return;
    if (fiber.started) _longjmp(fiber.here, 1);
    fiber.started = true;
    setcontext(&fiber.start);
}

// Lets the threads of a warp run until they wait for the block or are done.
inline void run_warp(int warp, bool reversed) {
    for (;;) {
        for (int i = 0; i < WARP; ++i)
            resume(warp * WARP + (reversed ? WARP - 1 - i : i));
        const Wait first = all[warp * WARP].wait;
        for (int i = 0; i < WARP; ++i)
            if (all[warp * WARP + i].wait != first) fail("threads of a warp wait at different points");
        if (first != AT_WARP) return;
    }
}

inline void run_block(bool reversed) {
    std::memset(shared.data(), 0xff, shared.size());
    for (Fiber& fiber : all) {
        if (fiber.stack.empty()) fiber.stack.resize(1 << 17);
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack.data();
        fiber.start.uc_stack.ss_size = fiber.stack.size();
        makecontext(&fiber.start, main_of_fiber, 0);
        fiber.started = false;
    }
    for (;;) {
        for (int w = 0; w < THREADS / WARP; ++w)
            run_warp(reversed ? THREADS / WARP - 1 - w : w, reversed);
        for (const Fiber& fiber : all)
            if (fiber.wait != all[0].wait) fail("threads of a block wait at different points");
        if (all[0].wait == DONE) break;
    }
}

inline void run(void (*entry)(const void*), const void* args, long long blocks, long long shared_bytes, bool reversed) {
    constexpr long long GUARD = 64;  // bytes behind the block's memory
    kernel = entry, arguments = args;
    for (long long i = 0; i < blocks; ++i) {
        block = reversed ? blocks - 1 - i : i;
        shared.resize(shared_bytes + GUARD);
        run_block(reversed);
        for (long long at = 0; at < GUARD; ++at)
            if (shared[shared_bytes + at] != char(0xff)) fail("wrote behind the shared memory");
    }
}

}  // namespace fibers

inline int thread_index() { return fibers::current; }
inline long long block_index() { return fibers::block; }
inline void* shared_memory() { return fibers::shared.data(); }
inline void sync_block() { fibers::wait(fibers::AT_BLOCK); }

inline float exchange(float x, int offset) {
    using namespace fibers;
    const int now = turn[current]++ % 2, other = current ^ offset;
    exchanged[now][current] = x;
    wait(AT_WARP);
    return exchanged[now][other];
}

inline unsigned ballot(bool yes) {
    using namespace fibers;
    const int now = turn[current]++ % 2, first = current / WARP * WARP;
    said[now][current] = yes;
    wait(AT_WARP);
    unsigned answer = 0;
    for (int i = 0; i < WARP; ++i)
        answer |= unsigned(said[now][first + i]) << i;
    return answer;
}

template <class To, class From>
inline To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// As exact as the reference's exponential is here; on a GPU both are off by up to 2 units in the last place.
inline float power_of_2(float x) { return x < -126.0f ? 0.0f : std::exp2(x); }
inline float reciprocal(float x) {
    const float y = 1.0f / (std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x);
    return std::fpclassify(y) == FP_SUBNORMAL ? std::copysign(0.0f, y) : y;
}
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float absolute(float x) { return std::fabs(x); }
inline float larger(float x, float y) { return std::fmax(x, y); }

template <int BYTES>
struct UnsignedOf;
template <>
struct UnsignedOf<2> {
    using type = unsigned short;
};
template <>
struct UnsignedOf<4> {
    using type = unsigned;
};
template <int BYTES>
using UnsignedInteger = typename UnsignedOf<BYTES>::type;

struct fp32 {
    unsigned bits;
};
struct bf16 {
    unsigned short bits;
};
struct fp16 {
    unsigned short bits;
};

template <class Type>
float to_float(unsigned bits);
template <>
inline float to_float<fp32>(unsigned bits) {
    return bits_as<float>(bits);
}
template <>
inline float to_float<bf16>(unsigned bits) {
    return bits_as<float>(bits << 16);
}
template <>
inline float to_float<fp16>(unsigned word) {
    const unsigned bits = word & 0xffff, sign = bits >> 15 << 31, exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent == 31) return bits_as<float>(sign | 0x7f800000u | fraction << 13);
    const float size =
        exponent ? std::ldexp(float(1024 + fraction), int(exponent) - 25) : std::ldexp(float(fraction), -24);
    return sign ? -size : size;
}

template <class Type>
unsigned from_float(float x);
template <>
inline unsigned from_float<fp32>(float x) {
    return bits_as<unsigned>(x);
}
template <>
inline unsigned from_float<bf16>(float x) {
    const unsigned bits = bits_as<unsigned>(x);
    return std::isnan(x) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
template <>
inline unsigned from_float<fp16>(float x) {
    const unsigned sign = bits_as<unsigned>(x) >> 31 << 15;
    const float size = std::fabs(x);
    if (std::isnan(x)) return 0x7fff;
    if (size >= 65520.0f) return sign | 0x7c00;  // rounds beyond the largest
    if (size < 0x1p-14f) return sign | unsigned(std::nearbyint(std::ldexp(size, 24)));
    const unsigned bits = bits_as<unsigned>(size);  // rebiased exponent, fraction rounded to 10 bits, to even
    return sign | (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
}
