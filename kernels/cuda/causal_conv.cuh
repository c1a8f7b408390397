// Depthwise causal convolution and SiLU: what forward and backward share. The mathematics is in kernels/README.md.
//
// A thread takes PACK channels through SPAN positions. Whoever compiles sets TAPS and PACK.
#pragma once

#include "tensors.cuh"

constexpr int GROUP = 8;  // positions that are read ahead of the arithmetic

// Mirrored by ctypes in mambatrain/ops/native/cuda/causal_conv.py: the same fields in the same order.
struct ConvArguments {
    int64 rows, length, channels;
    View x;                           // aligned to PACK elements, like all views here
    const float* initial_window;      // (B, TAPS - 1, D) or null
    const float* weight;              // (D, TAPS)
    const float* bias;                // (D,) or null
    const unsigned char* boundaries;  // (B, L) or null
    // forward writes
    View out;
    float* final_window;  // (B, TAPS - 1, D)
    // backward reads
    View grad_out;             // may be absent
    const float* grad_window;  // (B, TAPS - 1, D) or null
    // backward writes
    View dx;
    float* dinitial;  // (B, TAPS - 1, D) or null
    float* sums;      // (B spans, TAPS + 1, D): gradients of weight (the last tap first) and bias, to be summed
};
static_assert(sizeof(ConvArguments) == ARGUMENTS_BYTES, "the arguments differ from the caller's");

// PACK channels of one row, over positions begin .. end. Threads for which there are none go along, and write nothing.
struct Stretch {
    const ConvArguments& args;
    int64 row, span, spans, channel;
    int64 begin, end;
    bool exists;
    float weight[TAPS][PACK], bias[PACK];  // weight[k] multiplies the input k positions back

    DEVICE explicit Stretch(const ConvArguments& args) : args(args) {
        const int64 tiles = (args.channels + THREADS * PACK - 1) / (THREADS * PACK), index = block_index();
        spans = args.length > SPAN ? (args.length + SPAN - 1) / SPAN : 1;
        row = index / tiles / spans, span = index / tiles % spans;
        channel = (index % tiles * THREADS + thread_index()) * PACK;
        exists = channel < args.channels;
        if (!exists) channel = 0;
        begin = span * SPAN, end = begin + SPAN < args.length ? begin + SPAN : args.length;
#pragma unroll
        for (int c = 0; c < PACK; ++c) {
            bias[c] = args.bias ? args.bias[channel + c] : 0.0f;
#pragma unroll
            for (int k = 0; k < TAPS; ++k)
                weight[k][c] = args.weight[(channel + c) * TAPS + TAPS - 1 - k];
        }
    }

    // Bit i: does a document start at t + i step, where t + i step is a position?
    DEVICE unsigned find_starts(int64 t, int step) const {
        const int64 at = t + thread_index() % WARP * step;
        return ballot(args.boundaries && at >= 0 && at < args.length && args.boundaries[row * args.length + at]);
    }
    DEVICE Elements<PACK>& at(const View& view, int64 t) const {
        return *reinterpret_cast<Elements<PACK>*>(view.at(row, t, channel));
    }
    // Input -k, in a window.
    DEVICE float* in_window(float* window, int64 k) const {
        return window + (row * (TAPS - 1) + TAPS - 1 - k) * args.channels + channel;
    }
    // The input at t, which may lie before position 0 or behind the last.
    DEVICE void read_input(int64 t, float (&x)[PACK]) const {
        Elements<PACK> elements = {};
        if (t >= 0 && t < args.length) elements = at(args.x, t);
        const float* window =
            t < 0 && args.initial_window ? in_window(const_cast<float*>(args.initial_window), -t) : nullptr;
#pragma unroll
        for (int c = 0; c < PACK; ++c)
            x[c] = window ? window[c] : elements[c];
    }
};
