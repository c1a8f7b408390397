// Depthwise causal convolution and SiLU: what forward and backward share. The mathematics is in kernels/README.md.
//
// One item of work is one row of the batch, a block of positions and a tile of channels, walked position by position
// along contiguous memory.
#pragma once

#include "memory.h"

constexpr int BLOCK = 64;   // positions
constexpr int TILE = 1024;  // channels, at most: the rows that a position sees and all taps stay in the nearest caches
constexpr int MAX_TAPS = 4;
constexpr int GROUP = 4;  // positions worked on at once where nothing interrupts them

// Mirrored by ctypes in mambatrain/ops/native/causal_conv.py: the same fields in the same order.
struct ConvArguments {
    int64_t rows, length, channels, taps, num_threads;
    View x;
    View initial_window;        // (B, W - 1, D), may be absent
    const float* weight;        // (D, W)
    const float* bias;          // (D,) or null
    const uint8_t* boundaries;  // (B, L) or null
    // forward writes
    View out;
    View final_window;  // (B, W - 1, D)
    // backward reads
    View grad_out;     // may be absent
    View grad_window;  // may be absent
    // backward writes
    View dx;
    View dinitial;   // may be absent
    float* dweight;  // (D, W)
    float* dbias;    // (D,) or null

    int64_t blocks() const {
        return length > 0 ? (length + BLOCK - 1) / BLOCK : 1;
    }  // an empty row hands its window on
    int64_t tiles() const { return (channels + TILE - 1) / TILE; }
    int64_t tile_size() const {  // of about equal tiles, in whole vectors
        const int64_t tiles = this->tiles() > 0 ? this->tiles() : 1;
        return ((channels + tiles - 1) / tiles + WIDTH - 1) / WIDTH * WIDTH;
    }

    // How many taps position t uses: itself and what lies before it, back to the start of its document. t = length
    // stands for the position to come.
    int reach(int64_t row, int64_t t) const {
        int count = 1;
        for (; count < taps; ++count) {
            const int64_t later = t - count + 1;  // a document that starts here ends the reach
            if (boundaries && later >= 0 && later < length && boundaries[row * length + later]) break;
        }
        return count;
    }

    // Do positions t .. t + count - 1 use all taps, on the sequence alone?
    bool sees_all(int64_t row, int64_t t, int64_t count) const {
        if (t < taps - 1) return false;
        for (int64_t i = t - taps + 2; boundaries && i < t + count; ++i)
            if (boundaries[row * length + i]) return false;
        return true;
    }
};

// One position of one tensor, from one channel on. Absent: zeros.
struct Slice {
    void* data;
    Dtype dtype;

    INLINE Floats at(int64_t channel, int count) const { return data ? load(data, dtype, channel, count) : Floats{}; }
    INLINE void put(int64_t channel, int count, Floats x) const { store(data, dtype, channel, count, x); }
};

INLINE Slice slice(const View& view, int64_t row, int64_t t, int64_t channel) {
    return {view.data ? view.address(row, t, channel) : nullptr, view.dtype};
}

// The weights of a tile, [tap][channel] with tap 0 at the position itself, and the bias.
struct Taps {
    alignas(64) float weight[MAX_TAPS][TILE], bias[TILE];

    void read(const ConvArguments& args, int64_t first, int64_t size) {
        for (int64_t c = 0; c < size; ++c) {
            for (int64_t k = 0; k < args.taps; ++k)
                weight[k][c] = args.weight[(first + c) * args.taps + args.taps - 1 - k];
            bias[c] = args.bias ? args.bias[first + c] : 0.0f;
        }
        for (int64_t c = size; c < size + WIDTH && c < TILE; ++c) {
            for (int64_t k = 0; k < args.taps; ++k)
                weight[k][c] = 0.0f;
            bias[c] = 0.0f;
        }
    }
};

// What position t sees: input t - k for tap k, from the sequence, the window before it, or nothing.
template <int TAPS>
INLINE void find_inputs(const ConvArguments& args, int64_t row, int64_t t, int64_t first, Slice (&inputs)[TAPS]) {
    const int reach = args.reach(row, t);
    for (int k = 0; k < TAPS; ++k) {
        if (k >= reach)
            inputs[k] = {nullptr, FP32};
        else if (t - k >= 0)
            inputs[k] = slice(args.x, row, t - k, first);
        else
            inputs[k] = slice(args.initial_window, row, TAPS - 1 + t - k, first);
    }
}

// Item of work: channels first .. first + size of one row, positions begin .. end.
struct Item {
    int64_t row, block, first, size, begin, end;

    Item(const ConvArguments& args, int64_t index)
        : row(index / args.tiles() / args.blocks()),
          block(index / args.tiles() % args.blocks()),
          first(index % args.tiles() * args.tile_size()),
          size(args.channels - first < args.tile_size() ? args.channels - first : args.tile_size()),
          begin(block * BLOCK),
          end(begin + BLOCK < args.length ? begin + BLOCK : args.length) {}
};
