// Tensors that the caller owns, and scratch memory.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

#include "simd.h"

// A tensor (rows, length, size) whose last dimension is contiguous; strides count elements.
struct View {
    void* data;  // null: absent
    Dtype dtype;
    int64_t row_stride, time_stride;

    INLINE Floats at(int64_t row, int64_t t, int64_t channel, int count) const {
        return load(data, dtype, row * row_stride + t * time_stride + channel, count);
    }
    INLINE void put(int64_t row, int64_t t, int64_t channel, int count, Floats x) const {
        store(data, dtype, row * row_stride + t * time_stride + channel, count, x);
    }
    INLINE float one(int64_t row, int64_t t, int64_t i) const {
        int64_t offset = row * row_stride + t * time_stride + i;
        return dtype == FP32 ? static_cast<const float*>(data)[offset]
                             : widen_one(static_cast<const uint16_t*>(data)[offset]);
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
