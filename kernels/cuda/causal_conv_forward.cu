#include "causal_conv.cuh"

// seen[k]: the input k positions back; 0 where a document has started since.
struct Seen {
    float x[TAPS][PACK] = {};

    DEVICE void move_on(const float (&next)[PACK], bool starts) {
#pragma unroll
        for (int c = 0; c < PACK; ++c) {
#pragma unroll
            for (int k = TAPS - 1; k > 0; --k)
                x[k][c] = starts ? 0.0f : x[k - 1][c];
            x[0][c] = next[c];
        }
    }
    DEVICE Elements<PACK> convolve(const Stretch& stretch) const {
        Elements<PACK> out;
#pragma unroll
        for (int c = 0; c < PACK; ++c) {
            float p = stretch.bias[c];
#pragma unroll
            for (int k = 0; k < TAPS; ++k)
                p = fma(x[k][c], stretch.weight[k][c], p);
            out.set(c, p * sigmoid(p));
        }
        return out;
    }
};

KERNEL(4) causal_conv_forward(ARGUMENTS ConvArguments args) {
    const Stretch stretch(args);
    Seen seen;
    const unsigned before = stretch.find_starts(stretch.begin, -1);
#pragma unroll
    for (int k = TAPS - 1; k > 0; --k) {
        float x[PACK];
        stretch.read_input(stretch.begin - k, x);
        seen.move_on(x, before >> k & 1);
    }
#pragma unroll 1
    for (int64 begin = stretch.begin; begin < stretch.end; begin += GROUP) {
        const unsigned starts = stretch.find_starts(begin, 1) & ((1u << GROUP) - 1);
        if (!starts && begin + GROUP <= stretch.end) {
            Elements<PACK> ahead[GROUP];
#pragma unroll
            for (int i = 0; i < GROUP; ++i)
                ahead[i] = stretch.at(args.x, begin + i);
#pragma unroll
            for (int i = 0; i < GROUP; ++i) {
                float x[PACK];
#pragma unroll
                for (int c = 0; c < PACK; ++c)
                    x[c] = ahead[i][c];
                seen.move_on(x, false);
                const Elements<PACK> out = seen.convolve(stretch);
                if (stretch.exists) stretch.at(args.out, begin + i) = out;
            }
        } else {
#pragma unroll 1
            for (int i = 0; i < GROUP && begin + i < stretch.end; ++i) {
                float x[PACK];
                stretch.read_input(begin + i, x);
                seen.move_on(x, starts >> i & 1);
                const Elements<PACK> out = seen.convolve(stretch);
                if (stretch.exists) stretch.at(args.out, begin + i) = out;
            }
        }
    }
    if (stretch.end < args.length || !stretch.exists) return;
#pragma unroll
    for (int k = 1; k < TAPS; ++k)
#pragma unroll
        for (int c = 0; c < PACK; ++c)
            stretch.in_window(args.final_window, k)[c] = seen.x[k - 1][c];
}
