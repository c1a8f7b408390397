// All that the kernels ask of the machine beyond plain C++. The tests put functions for a CPU in this file's place.
#pragma once

#define DEVICE __device__ __forceinline__
// A block has THREADS threads; at least `blocks` of them share a processor, which bounds the registers of a thread.
#define KERNEL(blocks) extern "C" __global__ void __launch_bounds__(THREADS, blocks)
#define ARGUMENTS const __grid_constant__

constexpr int WARP = 32;

DEVICE int thread_index() { return int(threadIdx.x); }
DEVICE long long block_index() { return blockIdx.x; }

// What the launch set aside for the block.
DEVICE void* shared_memory() {
    extern __shared__ float4 memory[];
    return memory;
}

DEVICE void sync_block() { __syncthreads(); }

// The value of the thread whose place in the warp differs in the bits of `offset`; all 32 take part.
DEVICE float exchange(float x, int offset) { return __shfl_xor_sync(0xffffffffu, x, offset); }

// Bit i: did thread i of the warp say yes?
DEVICE unsigned ballot(bool yes) { return __ballot_sync(0xffffffffu, yes); }

// 2^x to 2 units in the last place; below 2^-126: 0.
DEVICE float power_of_2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 / x to 1 unit in the last place.
DEVICE float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// a b + c, rounded once.
DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }

DEVICE float absolute(float x) { return fabsf(x); }
DEVICE float larger(float x, float y) { return fmaxf(x, y); }

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

// The types of tensors, as bits.
struct fp32 {
    unsigned bits;
};
struct bf16 {
    unsigned short bits;
};
struct fp16 {
    unsigned short bits;
};

// Of the low bits.
template <class Type>
DEVICE float to_float(unsigned bits);
template <>
DEVICE float to_float<fp32>(unsigned bits) {
    return __uint_as_float(bits);
}
template <>
DEVICE float to_float<bf16>(unsigned bits) {
    return __uint_as_float(bits << 16);
}
template <>
DEVICE float to_float<fp16>(unsigned bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(static_cast<unsigned short>(bits)));
    return x;
}

// Rounded to the nearest.
template <class Type>
DEVICE unsigned from_float(float x);
template <>
DEVICE unsigned from_float<fp32>(float x) {
    return __float_as_uint(x);
}
template <>
DEVICE unsigned from_float<bf16>(float x) {
    unsigned short bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}
template <>
DEVICE unsigned from_float<fp16>(float x) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}
