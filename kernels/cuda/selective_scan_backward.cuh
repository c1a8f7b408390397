// Backward, the states: those of a chunk again from its entry, then their gradients from its end.
#pragma once

#include "selective_scan.cuh"

// One channel at one position; the letters are those of kernels/README.md.
struct alignas(16) Position {
    float delta, delta_u, gy, y;
};

// What the states of a channel come to at one position.
struct alignas(8) Sums {
    float q1, q2;
};

struct Shared {
    float B[CHUNK][PADDED], C[CHUNK][PADDED];
    Position at[CHUNK][BLOCK];
    Sums sums[CHUNK][BLOCK];
    // First the states before each position, of the j-th channel of each thread; then what a thread adds to dB, dC
    // there. The threads' places are shifted from one line to the next, so that no two fall on one bank when lines are
    // summed.
    Floats<STATES> lines[CHUNK][2][THREADS + LANES];
};
static_assert(sizeof(Shared) == SHARED_BYTES, "the shared memory differs from what the caller sets aside");
static_assert(CHANNELS <= 2, "a line for each");

constexpr int BACK = STATES > 4 ? UNROLL / 2 : UNROLL;  // positions that backward takes together: what registers hold

// The state before each position, again, and y. As in forward, UNROLL positions are read before any is written.
template <bool STARTS>
DEVICE void recompute(Shared& shared, const Place& place, int count, unsigned starts, const States& rate, States& h) {
#pragma unroll 1
    for (int begin = 0; begin < count; begin += UNROLL) {
        Floats<STATES> B[UNROLL], C[UNROLL];
        Position at[UNROLL][CHANNELS];
        float y[UNROLL][CHANNELS];
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) {
            B[i] = place.read(shared.B[begin + i]), C[i] = place.read(shared.C[begin + i]);
#pragma unroll
            for (int j = 0; j < CHANNELS; ++j)
                at[i][j] = shared.at[begin + i][place.channel(j)];
        }
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) {
#pragma unroll
            for (int j = 0; j < CHANNELS; ++j) {
                shared.lines[begin + i][j][thread_index()] = h.of[j];
                if (STARTS && (starts >> (begin + i) & 1)) h.of[j] = {};
                y[i][j] = 0.0f;
#pragma unroll
                for (int n = 0; n < STATES; ++n) {
                    float& state = h.of[j][n];
                    state = fma(power_of_2(at[i][j].delta * rate.of[j][n]), state, at[i][j].delta_u * B[i][n]);
                    y[i][j] = fma(state, C[i][n], y[i][j]);
                }
            }
            sum_over_lanes(y[i]);
        }
#pragma unroll
        for (int i = 0; i < UNROLL; ++i)
            if (place.writes()) shared.at[begin + i][place.channel(0)].y = y[i][0];
    }
}

// What a thread reads at one position.
struct Operands {
    Floats<STATES> B, C, before[CHANNELS];
    Position at[CHANNELS];

    DEVICE void read(const Shared& shared, const Place& place, int t) {
        B = place.read(shared.B[t]), C = place.read(shared.C[t]);
#pragma unroll
        for (int j = 0; j < CHANNELS; ++j)
            at[j] = shared.at[t][place.channel(j)], before[j] = shared.lines[t][j][thread_index()];
    }
};

// From the last position to the first: d enters as the gradient of the state behind the chunk, `h` as that state.
template <bool STARTS>
DEVICE void go_back(Shared& shared, const Place& place, int count, unsigned starts, const States& rate, States& h,
                    States& d, States& dA) {
#pragma unroll 1
    for (int begin = (count - 1) / BACK * BACK; begin >= 0; begin -= BACK) {
        Operands in[BACK];
        Floats<STATES> dB[BACK], dC[BACK];
        float q1[BACK][CHANNELS], q2[BACK][CHANNELS];
#pragma unroll
        for (int i = BACK - 1; i >= 0; --i)
            in[i].read(shared, place, begin + i);
#pragma unroll
        for (int i = BACK - 1; i >= 0; --i) {
            const bool start = STARTS && (starts >> (begin + i) & 1);
#pragma unroll
            for (int j = 0; j < CHANNELS; ++j) {
                const Position& at = in[i].at[j];
                q1[i][j] = q2[i][j] = 0.0f;
#pragma unroll
                for (int n = 0; n < STATES; ++n) {
                    const float decay = power_of_2(at.delta * rate.of[j][n]);
                    float& adjoint = d.of[j][n];
                    adjoint = fma(at.gy, in[i].C[n], adjoint);
                    dC[i][n] = j == 0 ? at.gy * h.of[j][n] : fma(at.gy, h.of[j][n], dC[i][n]);
                    dB[i][n] = j == 0 ? adjoint * at.delta_u : fma(adjoint, at.delta_u, dB[i][n]);
                    q1[i][j] = fma(adjoint, in[i].B[n], q1[i][j]);
                    adjoint = start ? 0.0f : decay * adjoint;
                    const float k = start ? 0.0f : adjoint * in[i].before[j][n];
                    dA.of[j][n] = fma(k, at.delta, dA.of[j][n]);
                    q2[i][j] = fma(k, rate.of[j][n], q2[i][j]);
                }
                h.of[j] = in[i].before[j];
            }
            sum_over_lanes(q1[i]);
            sum_over_lanes(q2[i]);
        }
#pragma unroll
        for (int i = BACK - 1; i >= 0; --i) {
            shared.lines[begin + i][0][thread_index()] = dB[i];
            shared.lines[begin + i][1][thread_index()] = dC[i];
            if (place.writes()) shared.sums[begin + i][place.channel(0)] = {q1[i][0], q2[i][0]};
        }
    }
}
