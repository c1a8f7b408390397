#include "causal_conv.cuh"

// From the last position to the first, of which t is the one that comes next.
struct Sums {
    float x[TAPS][PACK];  // the input at t - k
    float dx[TAPS][PACK] = {}, dweight[TAPS][PACK] = {}, dbias[PACK] = {};

    // What depends on `starts`, bit i: does a document start at t - i? A position sees no input from before it.
    DEVICE static bool sees(unsigned starts, int k) { return !(starts & ((1u << k) - 1)); }

    // `own`: does the position lie in the stretch, so that its part of weight and bias is counted here?
    DEVICE void add_position(const Stretch& stretch, const Elements<PACK>& grad, unsigned starts, bool own) {
#pragma unroll
        for (int c = 0; c < PACK; ++c) {
            float p = stretch.bias[c];
#pragma unroll
            for (int k = 0; k < TAPS; ++k)
                if (sees(starts, k)) p = fma(x[k][c], stretch.weight[k][c], p);
            const float s = sigmoid(p), g = grad[c] * (s * fma(p, 1.0f - s, 1.0f));
            if (own) dbias[c] += g;
#pragma unroll
            for (int k = 0; k < TAPS; ++k) {
                if (!sees(starts, k)) continue;
                dx[k][c] = fma(g, stretch.weight[k][c], dx[k][c]);
                if (own) dweight[k][c] = fma(g, x[k][c], dweight[k][c]);
            }
        }
    }
    // The window behind the last position hands its gradient to the inputs in it, as if it were position `length`.
    DEVICE void add_window(const Stretch& stretch, unsigned starts) {
#pragma unroll
        for (int k = 1; k < TAPS; ++k)
#pragma unroll
            for (int c = 0; c < PACK; ++c)
                if (stretch.args.grad_window && sees(starts, k))
                    dx[k][c] += stretch.in_window(const_cast<float*>(stretch.args.grad_window), k)[c];
    }
    DEVICE void write_input(const Stretch& stretch, int64 t) const {
        Elements<PACK> to;
#pragma unroll
        for (int c = 0; c < PACK; ++c)
            to.set(c, dx[0][c]);
        if (stretch.exists) stretch.at(stretch.args.dx, t) = to;
    }
    DEVICE void move_back(const float (&next)[PACK]) {
#pragma unroll
        for (int c = 0; c < PACK; ++c) {
#pragma unroll
            for (int k = 0; k < TAPS - 1; ++k)
                x[k][c] = x[k + 1][c], dx[k][c] = dx[k + 1][c];
            x[TAPS - 1][c] = next[c];
            dx[TAPS - 1][c] = 0.0f;
        }
    }
    // GROUP positions of the stretch that see nothing but the sequence.
    DEVICE void go_through(const Stretch& stretch, int64 t) {
        Elements<PACK> ahead[GROUP], grad[GROUP];
#pragma unroll
        for (int i = 0; i < GROUP; ++i) {
            ahead[i] = stretch.at(stretch.args.x, t - i - TAPS);
            grad[i] = stretch.at(stretch.args.grad_out, t - i);
        }
#pragma unroll
        for (int i = 0; i < GROUP; ++i) {
            float next[PACK];
#pragma unroll
            for (int c = 0; c < PACK; ++c)
                next[c] = ahead[i][c];
            add_position(stretch, grad[i], 0, true);
            write_input(stretch, t - i);
            move_back(next);
        }
    }
};

KERNEL(3) causal_conv_backward(ARGUMENTS ConvArguments args) {
    const Stretch stretch(args);
    // Positions behind the stretch see its inputs.
    int64 t = stretch.end + TAPS - 2 < args.length ? stretch.end + TAPS - 2 : args.length;
    Sums sums;
#pragma unroll
    for (int k = 0; k < TAPS; ++k)
        stretch.read_input(t - k, sums.x[k]);
#pragma unroll 1
    while (t >= stretch.begin) {
        const unsigned starts = stretch.find_starts(t, -1);
        const bool inside = t < stretch.end && t + 1 >= stretch.begin + GROUP && t + 1 >= GROUP + TAPS;
        if (inside && args.grad_out.data && !(starts & ((1u << (GROUP + TAPS)) - 1))) {
            sums.go_through(stretch, t);
            t -= GROUP;
            continue;
        }
        float next[PACK];
        Elements<PACK> grad = {};
        stretch.read_input(t - TAPS, next);
        if (args.grad_out.data && t < args.length) grad = stretch.at(args.grad_out, t);
        if (t == args.length)
            sums.add_window(stretch, starts);
        else
            sums.add_position(stretch, grad, starts, t < stretch.end);
        if (t < stretch.end) sums.write_input(stretch, t);
        sums.move_back(next);
        --t;
    }
    if (!stretch.exists) return;
    float* to = args.sums + (stretch.row * stretch.spans + stretch.span) * (TAPS + 1) * args.channels + stretch.channel;
#pragma unroll
    for (int c = 0; c < PACK; ++c) {
#pragma unroll
        for (int k = 0; k < TAPS; ++k)
            to[(TAPS - 1 - k) * args.channels + c] = sums.dweight[k][c];
        to[TAPS * args.channels + c] = sums.dbias[c];
    }
    if (stretch.begin > 0 || !args.dinitial) return;
#pragma unroll
    for (int k = 1; k < TAPS; ++k)  // the position that would come next is -1
#pragma unroll
        for (int c = 0; c < PACK; ++c)
            stretch.in_window(args.dinitial, k)[c] = sums.dx[k - 1][c];
}
