// How backward is divided into items of work, and what the items leave to be added up.
#pragma once

#include "selective_scan.h"

constexpr int VECTORS = 2;  // vectors of channels that go back through time together, for
constexpr int STATES = 4;   // so many states at a time: their adjoints and the gradients of A stay in registers

// Channels whose dB and dC are added up before they are written: the more, the less memory and the fewer items of work.
// With these (B, L, groups, 2 N) is never larger than (B, L, E).
inline int64_t vectors_per_group(const ScanArguments& args) {
    int64_t channels = 2 * args.padded_states() > 64 ? 2 * args.padded_states() : 64;
    return (channels / WIDTH + VECTORS - 1) / VECTORS * VECTORS;
}

inline int64_t num_groups(const ScanArguments& args) {
    return (args.vectors() + vectors_per_group(args) - 1) / vectors_per_group(args);
}

// dB and dC of some positions: the groups' sums, in their order.
inline void sum_groups(const ScanArguments& args, const float* partial_BC, int64_t row, int64_t begin, int64_t end) {
    const int64_t padded = args.padded_states(), groups = num_groups(args);
    float sums[2 * MAX_STATES];
    for (int64_t t = begin; t < end; ++t) {
        for (int64_t n = 0; n < 2 * padded; n += STATES_STEP) {
            float sum[STATES_STEP] = {};
            for (int64_t group = 0; group < groups; ++group) {
                const float* partial = partial_BC + ((row * groups + group) * args.length + t) * 2 * padded + n;
                for (int i = 0; i < STATES_STEP; ++i)
                    sum[i] += partial[i];
            }
            for (int i = 0; i < STATES_STEP; ++i) {  // STATES of dB, STATES of dC, and again
                const int64_t index = n + i, state = index / (2 * STATES) * STATES + index % STATES;
                sums[index / STATES % 2 * padded + state] = sum[i];
            }
        }
        for (int64_t n = 0; n < args.states; n += WIDTH) {
            const int count = args.states - n < WIDTH ? int(args.states - n) : WIDTH;
            args.dB.column(row, t, n, count).set(0, load(sums, FP32, n, count));
            args.dC.column(row, t, n, count).set(0, load(sums, FP32, padded + n, count));
        }
    }
}

// dA, dD and the bias's gradient of one vector of channels: the rows' sums, in their order.
inline void sum_rows(const ScanArguments& args, const float* partial_A, const float* partial_Db, int64_t vector) {
    const int64_t padded = args.padded_states();
    const int lanes = args.lanes(vector);
    Array<Floats> sums = allocate<Floats>(padded + 2);
    for (int64_t i = 0; i < padded + 2; ++i)
        sums[i] = Floats{};
    for (int64_t row = 0; row < args.rows; ++row) {
        const int64_t index = row * args.vectors() + vector;
        for (int64_t n = 0; n < padded; ++n)
            sums[n] += load_floats(partial_A + (index * padded + n) * WIDTH);
        for (int i = 0; i < 2; ++i)
            sums[padded + i] += load_floats(partial_Db + (2 * index + i) * WIDTH);
    }
    scatter_states(&sums[0], args.dA, vector, args);
    if (args.dD) store(args.dD, FP32, vector * WIDTH, lanes, sums[padded]);
    if (args.dbias) store(args.dbias, FP32, vector * WIDTH, lanes, sums[padded + 1]);
}
