// Vectors of WIDTH channels, as wide as the machine this file is compiled for, by the compiler's vector extensions.
//
// Every function here works lane by lane: a channel's result never depends on which lane it sits in or what its
// neighbours hold, so lanes behind the last channel may carry anything finite.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
#else  // SSE, NEON
constexpr int WIDTH = 4;
#endif

#define INLINE inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))  // a loop that gets all registers for itself
#define EXPORT __attribute__((visibility("default")))

typedef float Floats __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));
typedef uint32_t Words __attribute__((vector_size(4 * WIDTH)));

INLINE Floats broadcast(float x) { return x - Floats{}; }  // x - 0 keeps the sign of -0, x + 0 would not
INLINE Ints bits(Floats x) { return reinterpret_cast<Ints>(x); }
INLINE Floats from_bits(Ints x) { return reinterpret_cast<Floats>(x); }
// The larger of the two; a NaN in x stays.
INLINE Floats larger(Floats x, Floats floor) {
#if defined(__AVX512F__)
    return _mm512_max_ps(floor, x);
#elif defined(__AVX2__)
    return _mm256_max_ps(floor, x);
#else
    return floor > x ? floor : x;
#endif
}
INLINE Floats absolute(Floats x) { return from_bits(bits(x) & 0x7fffffff); }

// ---- memory: fp32 or bf16, the first `count` lanes

enum Dtype : int64_t { FP32 = 0, BF16 = 1 };

INLINE Floats load_floats(const float* p) {
    Floats x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

INLINE void store_floats(float* p, Floats x) { std::memcpy(p, &x, sizeof x); }

INLINE Floats widen(Halves x) { return reinterpret_cast<Floats>(__builtin_convertvector(x, Words) << 16); }

INLINE Halves narrow(Floats x) {  // to the nearest bf16, ties to even; a NaN stays one
    Words word = reinterpret_cast<Words>(x);
    Words rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
    Words result = reinterpret_cast<Words>(x == x) ? rounded : (word >> 16 | 0x40);
    return __builtin_convertvector(result, Halves);
}

typedef uint16_t Half;  // a bf16

// All lanes, of a dtype known beforehand.
INLINE Floats load_full(const float* p) { return load_floats(p); }
INLINE void store_full(float* p, Floats x) { store_floats(p, x); }
INLINE Floats load_full(const Half* p) {
    Halves x;
    std::memcpy(&x, p, sizeof x);
    return widen(x);
}
INLINE void store_full(Half* p, Floats x) {
    Halves y = narrow(x);
    std::memcpy(p, &y, sizeof y);
}

INLINE Floats load(const void* base, Dtype dtype, int64_t offset, int count) {
    if (dtype == FP32) {
        const float* p = static_cast<const float*>(base) + offset;
        if (count >= WIDTH) return load_full(p);
        Floats x = {};
        std::memcpy(&x, p, 4 * count);
        return x;
    }
    const Half* p = static_cast<const Half*>(base) + offset;
    if (count >= WIDTH) return load_full(p);
    Halves x = {};
    std::memcpy(&x, p, 2 * count);
    return widen(x);
}

INLINE void store(void* base, Dtype dtype, int64_t offset, int count, Floats x) {
    if (dtype == FP32) {
        float* p = static_cast<float*>(base) + offset;
        if (count >= WIDTH)
            store_full(p, x);
        else
            std::memcpy(p, &x, 4 * count);
        return;
    }
    Half* p = static_cast<Half*>(base) + offset;
    Halves y = narrow(x);
    if (count >= WIDTH)
        std::memcpy(p, &y, sizeof y);
    else
        std::memcpy(p, &y, 2 * count);
}

// ---- exponentials

constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it leaves x, rounded to an integer, in the low bits
constexpr float LOG2_E = 1.44269504f, LOG2_E_REST = 1.92596299e-8f, LN_2 = 0.693147181f;

// 2^x for x <= 0 to 1.2e-7 relative; below 2^-126 about 2^-126.
//
// x = n / ENTRIES + r: 2^(n / ENTRIES) comes from a table in a register and the exponent field, 2^r from a polynomial.
// It is exact at r = 0 and so is its slope: a bias there would add up over the thousands of positions that a slowly
// decaying state lives.
struct Exp2 {
#if defined(__AVX2__)
    static constexpr int ENTRIES = WIDTH, ENTRY_BITS = WIDTH == 16 ? 4 : 3;
    Ints table;

    Exp2() {  // 2^(j / ENTRIES), less j where it will be added along with the exponent
        for (int j = 0; j < ENTRIES; ++j) {
            float entry = __builtin_exp2f(float(j) / ENTRIES);
            int32_t word;
            std::memcpy(&word, &entry, 4);
            table[j] = word - (j << (23 - ENTRY_BITS));
        }
    }
#else
    static constexpr int ENTRIES = 1;
#endif
    static constexpr float SHIFT = ROUND / ENTRIES;

    // 2^(n / ENTRIES + r), with n in the low bits of `shifted`
    INLINE Floats power(Floats shifted, Floats r) const {
#if defined(__AVX512F__)
        Ints entry = (Ints)_mm512_permutexvar_epi32((__m512i)bits(shifted), (__m512i)table);
        Floats p = (r * 0.05550595f + 0.24023429f) * r + 0.6931472f;
#elif defined(__AVX2__)
        Ints entry = (Ints)_mm256_permutevar8x32_epi32((__m256i)table, (__m256i)bits(shifted));
        Floats p = ((r * 0.009619124f + 0.055510614f) * r + 0.2402265f) * r + 0.6931472f;
#else
        constexpr int ENTRY_BITS = 0;
        Ints entry = bits(broadcast(1.0f));
        Floats p = r * 0.00015476301f + 0.001340027f;
        p = p * r + 0.009618004f;
        p = p * r + 0.05550328f;
        p = p * r + 0.2402265f;
        p = p * r + 0.6931472f;
#endif
        Floats power = from_bits(entry + (bits(shifted) << (23 - ENTRY_BITS)));
        return power * (p * r) + power;
    }

    INLINE Floats operator()(Floats x) const {
        x = larger(x, broadcast(-126.0f));
        Floats shifted = x + SHIFT;
        return power(shifted, x - (shifted - SHIFT));
    }

    // e^x for x <= 0: the logarithm's base is changed in two parts, so that the error does not grow with |x|.
    INLINE Floats exp(Floats x) const {
        x = larger(x, broadcast(-87.0f));
        Floats shifted = x * LOG2_E + SHIFT, n = shifted - SHIFT;
#if defined(__FMA__) || defined(__aarch64__)
        return power(shifted, (x * LOG2_E - n) + x * LOG2_E_REST);
#else
        return power(shifted, ((x - n * 0.693359375f) + n * 2.12194440e-4f) * LOG2_E);  // n * 355 / 512 is exact
#endif
    }
};

INLINE Floats reciprocal(Floats x) {
#if defined(__AVX512F__)
    Floats y = _mm512_rcp14_ps(x);
    return y * (1.0f - x * y) + y;
#else
    return 1.0f / x;
#endif
}

INLINE Floats choose(Ints condition, Floats yes, Floats no) { return condition ? yes : no; }

// 1 / (1 + e^-x) by e = exp(-|x|)
INLINE Floats sigmoid(Floats x, const Exp2& exp2) {
    Floats e = exp2.exp(-absolute(x));
    Floats positive = reciprocal(1.0f + e);
    return choose(x < 0.0f, e * positive, positive);
}

struct Softplus {
    Floats value;  // log(1 + e^x)
    Floats slope;  // its derivative, 1 / (1 + e^-x)
};

// log(1 + e^x) = max(x, 0) + log1p(e), e = exp(-|x|), log1p(e) = 2 atanh(s), s = e / (2 + e). Beyond x = 20, where
// torch takes x itself and 1 for the slope, e is below half a unit in the last place of both: the same numbers.
INLINE Softplus softplus(Floats x, const Exp2& exp2) {
    Floats e = exp2.exp(-absolute(x));
    Floats s = e * reciprocal(2.0f + e);
    Floats s2 = s * s;
    Floats p = broadcast(0.14012229f);
    p = p * s2 + 0.13999571f;
    p = p * s2 + 0.2001085f;
    p = p * s2 + 0.33333207f;
    Floats twice = s + s, positive = reciprocal(1.0f + e);
    return {larger(x, Floats{}) + (twice * (s2 * p) + twice), choose(x < 0.0f, e * positive, positive)};
}

// ---- across the lanes

// Lane i of the result is lane Pick::from(i) of a and b together.
template <class Pick, int... I>
INLINE Floats shuffle(Floats a, Floats b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, Pick::from(I)...);
#else
    return __builtin_shuffle(a, b, Ints{Pick::from(I)...});
#endif
}

template <class Pick>
INLINE Floats shuffle(Floats a, Floats b) {
    return shuffle<Pick>(a, b, std::make_integer_sequence<int, WIDTH>());
}

// Inside each block of 4 lanes: a b a b, of their lower or upper halves.
template <int UPPER>
struct Interleave {
    static constexpr int from(int i) { return i / 4 * 4 + i % 4 / 2 + i % 2 * WIDTH + 2 * UPPER; }
};

// Inside each block of 4 lanes: a a b b, of their lower or upper halves.
template <int UPPER>
struct Join {
    static constexpr int from(int i) { return i / 4 * 4 + i % 2 + i % 4 / 2 * WIDTH + 2 * UPPER; }
};

template <int BY>
struct Rotate {
    static constexpr int from(int i) { return (i + BY) % WIDTH; }
};

// to[i] += the sum of the lanes of x[i], for four vectors at once: pairs of lanes, pairs of pairs, then the blocks.
INLINE void add_lane_sums(const Floats x[4], float* to) {
    Floats ab = shuffle<Interleave<0>>(x[0], x[1]) + shuffle<Interleave<1>>(x[0], x[1]);  // a b a b ...
    Floats cd = shuffle<Interleave<0>>(x[2], x[3]) + shuffle<Interleave<1>>(x[2], x[3]);
    Floats abcd = shuffle<Join<0>>(ab, cd) + shuffle<Join<1>>(ab, cd);  // a b c d ...
    if (WIDTH >= 16) abcd += shuffle<Rotate<8>>(abcd, abcd);
    if (WIDTH >= 8) abcd += shuffle<Rotate<4>>(abcd, abcd);
    typedef float Four __attribute__((vector_size(16)));
    Four sum, before;
    std::memcpy(&before, to, sizeof before);
    std::memcpy(&sum, &abcd, sizeof sum);
    sum += before;
    std::memcpy(to, &sum, sizeof sum);
}

// Squares of SIZE lanes: the one above the diagonal of a and b goes to the other's place below it.
template <int SIZE, bool LOWER>
struct Exchange {
    static constexpr int from(int i) {
        const bool second = i & SIZE;
        return LOWER ? (second ? i + WIDTH : i + SIZE) : (second ? i - SIZE + WIDTH : i);
    }
};

template <int SIZE>
INLINE void exchange(Floats (&x)[WIDTH]) {
    for (int i = 0; i < WIDTH; ++i) {
        if (i & SIZE) continue;
        Floats a = x[i], b = x[i + SIZE];
        x[i] = shuffle<Exchange<SIZE, false>>(a, b);
        x[i + SIZE] = shuffle<Exchange<SIZE, true>>(a, b);
    }
}

// x[i][j] <-> x[j][i]
INLINE void transpose(Floats (&x)[WIDTH]) {
    exchange<1>(x);
    exchange<2>(x);
    if constexpr (WIDTH >= 8) exchange<4>(x);
    if constexpr (WIDTH >= 16) exchange<8>(x);
}
