// Mamba-1's selective scan: what forward and backward share. The mathematics is in kernels/README.md.
//
// One item of work is one row of the batch and one group of channels, serial in time. Vector lanes are channels. Time
// is cut into chunks: forward keeps the state at the entry of each, backward recomputes what lies between.
#pragma once

#include "memory.h"

constexpr int CHUNK = 32;       // positions
constexpr int STATES_STEP = 8;  // the number of states is padded to a multiple of this with A = B = C = 0

constexpr int MAX_STATES = 256;
constexpr int SPAN = 512;  // channels of one item of work, at most

// Mirrored by ctypes in mambatrain/ops/native/selective_scan.py: the same fields in the same order.
struct ScanArguments {
    int64_t rows, length, channels, states, num_threads;
    View u, dt, z, B, C;         // z may be absent
    const float* A;              // (E, N)
    const float* D;              // (E,) or null
    const float* dt_bias;        // (E,) or null
    const float* initial_state;  // (B, E, N) or null
    const uint8_t* boundaries;   // (B, L) or null
    float* entries;              // (B, vectors, chunks, padded states, WIDTH); forward may be given null
    // forward writes
    View out;
    float* final_state;  // (B, E, N)
    // backward reads
    View grad_out;            // may be absent
    const float* grad_state;  // (B, E, N) or null
    // backward writes
    View du, ddt, dz, dB, dC;  // dz as z
    float* dA;                 // (E, N)
    float* dD;                 // (E,)
    float* dbias;              // (E,)
    float* dinitial;           // (B, E, N) or null

    int64_t vectors() const { return (channels + WIDTH - 1) / WIDTH; }
    int64_t chunks() const { return (length + CHUNK - 1) / CHUNK; }
    int64_t state_updates() const { return rows * length * channels * states; }
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

// Vectors of channels in one item of work, a multiple of `step`. Many: a position's channels lie side by side in one
// page of memory, and walking to the next page costs more than the scan of a few vectors. Fewer where threads would go
// idle; no result depends on it.
inline int64_t vectors_per_item(const ScanArguments& args, int64_t threads, int64_t step) {
    int64_t steps = SPAN / (WIDTH * step) > 1 ? SPAN / (WIDTH * step) : 1;
    while (steps > 1 && args.rows * (args.vectors() / (steps * step)) < 4 * threads)
        steps /= 2;
    const int64_t all = (args.vectors() + step - 1) / step;
    return (steps < all ? steps : all) * step;
}

// The positions of one chunk that all channels share, in fp32 and padded to STATES_STEP.
struct SharedInputs {
    Array<float> B, C;   // [CHUNK][padded states]
    bool starts[CHUNK];  // does a document start here?
    int64_t padded;

    explicit SharedInputs(const ScanArguments& args)
        : B(allocate<float>(CHUNK * args.padded_states())),
          C(allocate<float>(CHUNK * args.padded_states())),
          padded(args.padded_states()) {}

    void read(const ScanArguments& args, int64_t row, int64_t chunk) {
        const int64_t begin = chunk * CHUNK;
        const int length = args.chunk_length(chunk);
        for (int t = 0; t < length; ++t)
            starts[t] = args.boundaries && args.boundaries[row * args.length + begin + t];
        read_states(args.B, &B[0], args, row, begin, length);
        read_states(args.C, &C[0], args, row, begin, length);
    }

  private:
    void read_states(const View& view, float* to, const ScanArguments& args, int64_t row, int64_t begin, int length) {
        for (int64_t n = 0; n < padded; n += WIDTH) {
            const int64_t left = args.states - n, room = padded - n < WIDTH ? padded - n : WIDTH;
            const Column states = view.column(row, begin, n, left < 0 ? 0 : left < WIDTH ? int(left) : WIDTH);
            for (int t = 0; t < length; ++t) {
                Floats x = states[t];
                if (room == WIDTH)
                    store_floats(to + t * padded + n, x);
                else
                    std::memcpy(to + t * padded + n, &x, 4 * (WIDTH < STATES_STEP ? WIDTH : STATES_STEP));
            }
        }
    }
};

// (E, N) or one row of (B, E, N), absent: zeros, to [padded states] vectors of channels; and back.
inline void gather_states(const float* from, Floats* to, int64_t vector, const ScanArguments& args,
                          float scale = 1.0f) {
    const int lanes = from ? args.lanes(vector) : 0;
    const float* first = from ? from + vector * WIDTH * args.states : nullptr;
    int64_t n = 0;
    for (; lanes == WIDTH && n + WIDTH <= args.states; n += WIDTH) {
        Floats square[WIDTH];
        for (int i = 0; i < WIDTH; ++i)
            square[i] = load_floats(first + i * args.states + n);
        transpose(square);
        for (int i = 0; i < WIDTH; ++i)
            to[n + i] = square[i] * scale;
    }
    for (; n < args.padded_states(); ++n) {
        to[n] = Floats{};
        if (n >= args.states) continue;
        for (int lane = 0; lane < lanes; ++lane)
            to[n][lane] = first[lane * args.states + n] * scale;
    }
}

inline void scatter_states(const Floats* from, float* to, int64_t vector, const ScanArguments& args) {
    const int lanes = args.lanes(vector);
    float* first = to + vector * WIDTH * args.states;
    int64_t n = 0;
    for (; lanes == WIDTH && n + WIDTH <= args.states; n += WIDTH) {
        Floats square[WIDTH];
        for (int i = 0; i < WIDTH; ++i)
            square[i] = from[n + i];
        transpose(square);
        for (int i = 0; i < WIDTH; ++i)
            store_floats(first + i * args.states + n, square[i]);
    }
    for (; n < args.states; ++n)
        for (int lane = 0; lane < lanes; ++lane)
            first[lane * args.states + n] = from[n][lane];
}
