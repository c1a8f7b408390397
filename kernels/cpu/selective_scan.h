// Mamba-1's selective scan: what forward and backward share. The mathematics is in kernels/README.md.
//
// One item of work is one row of the batch and one group of channels, serial in time. Vector lanes are channels. Time
// is cut into chunks: forward keeps the state at the entry of each, backward recomputes what lies between.
#pragma once

#include "memory.h"

#ifndef CH
#define CH 32
#endif
constexpr int CHUNK = CH;  // positions
constexpr int STATES_STEP = 8;   // the number of states is padded to a multiple of this with A = B = C = 0

constexpr int MAX_STATES = 256;

// Mirrored by ctypes in mambatrain/ops/native/selective_scan.py: the same fields in the same order.
struct ScanArguments {
    int64_t rows, length, channels, states, num_threads;
    View u, dt, z, B, C;          // z may be absent
    const float* A;               // (E, N)
    const float* D;               // (E,) or null
    const float* dt_bias;         // (E,) or null
    const float* initial_state;   // (B, E, N) or null
    const uint8_t* boundaries;    // (B, L) or null
    float* entries;               // (B, vectors, chunks, padded states, WIDTH); forward may be given null
    // forward writes
    View out;
    float* final_state;           // (B, E, N)
    // backward reads
    View grad_out;                // may be absent
    const float* grad_state;      // (B, E, N) or null
    // backward writes
    View du, ddt, dz, dB, dC;     // dz as z
    float* dA;                    // (E, N)
    float* dD;                    // (E,)
    float* dbias;                 // (E,)
    float* dinitial;              // (B, E, N) or null

    int64_t vectors() const { return (channels + WIDTH - 1) / WIDTH; }
    int64_t chunks() const { return (length + CHUNK - 1) / CHUNK; }
    int64_t padded_states() const { return (states + STATES_STEP - 1) / STATES_STEP * STATES_STEP; }
    int lanes(int64_t vector) const {
        int64_t left = channels - vector * WIDTH;
        return left < 0 ? 0 : left < WIDTH ? int(left) : WIDTH;
    }
    int chunk_length(int64_t chunk) const {
        int64_t left = length - chunk * CHUNK;
        return left < CHUNK ? int(left) : CHUNK;
    }
    float* entry(int64_t row, int64_t vector, int64_t chunk) const {
        return entries + ((row * vectors() + vector) * chunks() + chunk) * padded_states() * WIDTH;
    }
};

// The positions of one chunk that all channels share, in fp32 and padded to STATES_STEP.
struct SharedInputs {
    Array<float> B, C;  // [CHUNK][padded states]
    bool starts[CHUNK];  // does a document start here?
    int64_t padded;

    explicit SharedInputs(const ScanArguments& args)
        : B(allocate<float>(CHUNK * args.padded_states())),
          C(allocate<float>(CHUNK * args.padded_states())),
          padded(args.padded_states()) {}

    void read(const ScanArguments& args, int64_t row, int64_t chunk) {
        for (int t = 0; t < args.chunk_length(chunk); ++t) {
            int64_t position = chunk * CHUNK + t;
            starts[t] = args.boundaries && args.boundaries[row * args.length + position];
            read_states(args.B, &B[t * padded], args.states, row, position);
            read_states(args.C, &C[t * padded], args.states, row, position);
        }
    }

  private:
    void read_states(const View& view, float* to, int64_t states, int64_t row, int64_t position) const {
        int64_t n = 0;
        for (; n + WIDTH <= states; n += WIDTH) store_floats(to + n, view.at(row, position, n, WIDTH));
        for (; n < states; ++n) to[n] = view.one(row, position, n);
        for (; n < padded; ++n) to[n] = 0.0f;
    }
};

// (E, N) or one row of (B, E, N) <-> [padded states] vectors of channels.
INLINE void gather_states(const float* from, Floats* to, int64_t vector, const ScanArguments& args, float scale = 1.0f) {
    int lanes = args.lanes(vector);
    for (int64_t n = 0; n < args.padded_states(); ++n) {
        Floats x = {};
        if (from && n < args.states)
            for (int lane = 0; lane < lanes; ++lane)
                x[lane] = from[(vector * WIDTH + lane) * args.states + n] * scale;
        to[n] = x;
    }
}

INLINE void scatter_states(const Floats* from, float* to, int64_t vector, const ScanArguments& args) {
    for (int lane = 0; lane < args.lanes(vector); ++lane)
        for (int64_t n = 0; n < args.states; ++n) to[(vector * WIDTH + lane) * args.states + n] = from[n][lane];
}
