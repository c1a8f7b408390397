// Mamba-2's scan in its serial form: what forward and backward share. The mathematics is in kernels/README.md.
//
// Vector lanes are states. A tile of TILE_CHANNELS channels and a few vectors of states stays in registers for a chunk,
// serial in time: two products an element are what the chunked form of matrix products needs too, and there is nothing
// beside them. Forward keeps the state at the entry of each chunk, backward recomputes what lies between.
#pragma once

#include "memory.h"

constexpr int SSD_CHUNK = 128;  // positions
constexpr int TILE_CHANNELS = 4;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int TILE_VECTORS = 4;  // with 32 registers, half of them for the tile
#else
constexpr int TILE_VECTORS = 2;
#endif

// A tensor (rows, length, heads or groups, size) whose last dimension is contiguous.
struct HeadView {
    View view;
    int64_t head_stride;

    INLINE Column column(int64_t row, int64_t t, int64_t head, int64_t i, int count) const {
        return view.column(row, t, head * head_stride + i, count);
    }
};

// Mirrored by ctypes in mambatrain/ops/native/ssd.py: the same fields in the same order.
struct SSDArguments {
    int64_t rows, length, heads, groups, channels, states, num_threads;
    HeadView x, B, C;
    View dt;                     // (B, L, H)
    const float* A;              // (H,)
    const float* D;              // (H,) or null
    const float* dt_bias;        // (H,) or null
    const float* initial_state;  // (B, H, P, N) or null
    const uint8_t* boundaries;   // (B, L) or null
    float* entries;              // (B, H, chunks, P, N); forward may be given null
    // forward writes
    HeadView out;
    float* final_state;  // (B, H, P, N)
    // backward reads
    HeadView grad_out;        // may be absent
    const float* grad_state;  // (B, H, P, N) or null
    // backward writes
    HeadView dx, dB, dC;
    View ddt;
    float* dA;        // (H,)
    float* dD;        // (H,)
    float* dbias;     // (H,)
    float* dinitial;  // (B, H, P, N) or null

    int64_t chunks() const { return (length + SSD_CHUNK - 1) / SSD_CHUNK; }
    int chunk_length(int64_t chunk) const {
        int64_t left = length - chunk * SSD_CHUNK;
        return left < SSD_CHUNK ? int(left) : SSD_CHUNK;
    }
    int64_t heads_per_group() const { return heads / groups; }
    int64_t state_size() const { return channels * states; }
    int64_t state_updates() const { return rows * length * heads * channels * states; }
    int64_t padded_states() const { return (states + WIDTH - 1) / WIDTH * WIDTH; }
    int64_t padded_channels() const {  // whole tiles, and whole vectors where channels are read as such
        const int64_t step = WIDTH > TILE_CHANNELS ? WIDTH : TILE_CHANNELS;
        return (channels + step - 1) / step * step;
    }
};

// `size` values of each position of a chunk, in fp32 and padded with zeros.
inline void read_positions(const HeadView& view, int64_t row, int64_t begin, int64_t head, int64_t size, int length,
                           float* to, int64_t padded) {
    for (int64_t i = 0; i < padded; i += WIDTH) {
        const int64_t left = size - i;
        const Column column = view.column(row, begin, head, i, left < 0 ? 0 : left < WIDTH ? int(left) : WIDTH);
        for (int t = 0; t < length; ++t)
            store_floats(to + t * padded + i, column[t]);
    }
}

// A head's state (P, N) <-> the same, padded.
inline void read_state(const float* from, float* to, const SSDArguments& args) {
    const int64_t padded = args.padded_states();
    std::memset(to, 0, args.padded_channels() * padded * sizeof(float));
    if (!from) return;
    for (int64_t p = 0; p < args.channels; ++p)
        std::memcpy(to + p * padded, from + p * args.states, args.states * sizeof(float));
}

inline void write_state(const float* from, float* to, const SSDArguments& args) {
    for (int64_t p = 0; p < args.channels; ++p)
        std::memcpy(to + p * args.states, from + p * args.padded_states(), args.states * sizeof(float));
}

// What the heads of a group share of one chunk.
struct GroupInputs {
    Array<float> B, C;  // [SSD_CHUNK][padded states]
    bool starts[SSD_CHUNK];

    explicit GroupInputs(const SSDArguments& args)
        : B(allocate<float>(SSD_CHUNK * args.padded_states())), C(allocate<float>(SSD_CHUNK * args.padded_states())) {}

    void read(const SSDArguments& args, int64_t row, int64_t group, int64_t chunk) {
        const int64_t begin = chunk * SSD_CHUNK, padded = args.padded_states();
        const int length = args.chunk_length(chunk);
        for (int t = 0; t < length; ++t)
            starts[t] = args.boundaries && args.boundaries[row * args.length + begin + t];
        read_positions(args.B, row, begin, group, args.states, length, &B[0], padded);
        read_positions(args.C, row, begin, group, args.states, length, &C[0], padded);
    }
};

// What is one number a position of a chunk for a head.
struct HeadInputs {
    alignas(64) float dt[SSD_CHUNK], slope[SSD_CHUNK], decay[SSD_CHUNK];

    void read(const SSDArguments& args, int64_t row, int64_t head, int64_t chunk, const Exp2& exp2) {
        const int length = args.chunk_length(chunk);
        const Column raw = args.dt.column(row, chunk * SSD_CHUNK, head, 1);
        const float bias = args.dt_bias ? args.dt_bias[head] : 0.0f, rate = args.A[head] * LOG2_E;
        for (int t = 0; t < SSD_CHUNK; ++t)
            dt[t] = t < length ? raw[t][0] + bias : 0.0f;
        for (int t = 0; t < SSD_CHUNK; t += WIDTH) {  // lanes are positions
            const Softplus delta = softplus(load_floats(dt + t), exp2);
            store_floats(dt + t, delta.value);
            store_floats(slope + t, delta.slope);
            store_floats(decay + t, exp2(delta.value * rate));
        }
    }
};
