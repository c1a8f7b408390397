// Tensors that the caller owns, and the functions of one number that the operators share.
//
// Whoever compiles sets ELEMENT, the type of what has a length: fp32, bf16 or fp16. States, parameters and everything
// inside are fp32. Products and sums are fused where `fma` says so and nowhere else (-fmad=false): two ways through a
// kernel give the same bits.
#pragma once

#include "intrinsics.cuh"

using int64 = long long;
using Element = ELEMENT;

// SIZE floats that are read and written at once.
template <int SIZE>
struct alignas(SIZE < 4 ? 4 * SIZE : 16) Floats {
    float of[SIZE];
    DEVICE float& operator[](int i) { return of[i]; }
    DEVICE float operator[](int i) const { return of[i]; }
};

// SIZE elements that are read and written at once, kept in the words they come in.
template <int SIZE>
struct alignas(SIZE * sizeof(Element) < 16 ? SIZE * sizeof(Element) : 16) Elements {
    static constexpr int PER_WORD = SIZE == 1 ? 1 : 4 / sizeof(Element);
    using Word = UnsignedInteger<PER_WORD * sizeof(Element)>;
    Word words[SIZE / PER_WORD];

    DEVICE float operator[](int i) const {
        return to_float<Element>(words[i / PER_WORD] >> i % PER_WORD * 8 * sizeof(Element));
    }
    DEVICE void set(int i, float x) {
        const Word bits = Word(from_float<Element>(x)) << i % PER_WORD * 8 * sizeof(Element);
        words[i / PER_WORD] = i % PER_WORD == 0 ? bits : words[i / PER_WORD] | bits;
    }
};

// A tensor (rows, length, size) whose last dimension is contiguous; strides count elements. Null: absent.
struct View {
    Element* data;
    int64 row_stride, time_stride;

    DEVICE Element* at(int64 row, int64 t, int64 i) const { return data + row * row_stride + t * time_stride + i; }
};

constexpr float LOG2_E = 1.44269504f, LOG2_E_REST = 1.925963e-8f, LN_2 = 0.69314718f;

// e^x for x <= 0: the logarithm's base is changed in two parts, so that the error does not grow with |x|.
DEVICE float exp_of_negative(float x) {
    x = larger(x, -87.0f);
    const float whole = x * LOG2_E;
    const float rest = fma(x, LOG2_E_REST, fma(x, LOG2_E, -whole));
    const float power = power_of_2(whole);
    return fma(power, rest * LN_2, power);
}

// 1 / (1 + e^-x)
DEVICE float sigmoid(float x) { return reciprocal(1.0f + power_of_2(-LOG2_E * x)); }

struct Softplus {
    float value;  // log(1 + e^x)
    float slope;  // its derivative, 1 / (1 + e^-x)
};

// log(1 + e^x) = max(x, 0) + log1p(e), e = exp(-|x|), log1p(e) = 2 atanh(s), s = e / (2 + e). Beyond x = 20, where
// torch takes x itself and 1 for the slope, e is below half a unit in the last place of both: the same numbers.
DEVICE Softplus softplus(float x) {
    const float e = exp_of_negative(-absolute(x));
    const float s = e * reciprocal(2.0f + e), s2 = s * s;
    float p = fma(0.14012229f, s2, 0.13999571f);
    p = fma(p, s2, 0.2001085f);
    p = fma(p, s2, 0.33333207f);
    const float twice = s + s, positive = reciprocal(1.0f + e);
    return {(x < 0.0f ? 0.0f : x) + fma(twice, s2 * p, twice), x < 0.0f ? e * positive : positive};
}
