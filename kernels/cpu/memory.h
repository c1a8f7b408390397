// Tensors that the caller owns, and scratch memory.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

#include "simd.h"

// WIDTH channels, or the first `count` of them, at one position after another; what is absent reads as zeros.
struct Column {
    char* data;
    int64_t step;  // bytes
    Dtype dtype;
    int count;

    INLINE void prefetch(int64_t t) const { __builtin_prefetch(data + t * step); }
    INLINE Floats operator[](int64_t t) const { return count ? load(data + t * step, dtype, 0, count) : Floats{}; }
    INLINE void set(int64_t t, Floats x) const {
        if (count) store(data + t * step, dtype, 0, count, x);
    }
};

// A tensor (rows, length, size) whose last dimension is contiguous; strides count elements.
struct View {
    void* data;  // null: absent
    Dtype dtype;
    int64_t row_stride, time_stride;

    INLINE char* address(int64_t row, int64_t t, int64_t i) const {
        const int64_t size = dtype == FP32 ? 4 : 2;
        return static_cast<char*>(data) + (row * row_stride + t * time_stride + i) * size;
    }
    INLINE Column column(int64_t row, int64_t t, int64_t channel, int count) const {
        if (!data) return {nullptr, 0, FP32, 0};
        return {address(row, t, channel), time_stride * (dtype == FP32 ? 4 : 2), dtype, count};
    }
};

struct Free {
    void operator()(void* p) const { std::free(p); }
};

template <class T>
using Array = std::unique_ptr<T[], Free>;

template <class T>
Array<T> allocate(int64_t count) {
    int64_t bytes = (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    void* p = std::aligned_alloc(64, bytes ? bytes : 64);
    if (!p) std::abort();
    return Array<T>(static_cast<T*>(p));
}
