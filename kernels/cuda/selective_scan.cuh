// Mamba-1's selective scan: what forward and backward share. The mathematics is in kernels/README.md.
//
// A block of threads takes one row and BLOCK channels through time, serially, CHUNK positions at a time. In each chunk
// threads are first items: PACK channels each at a few positions, for what needs no state (softplus, gates, reading and
// writing). Then LANES neighbouring threads share CHANNELS channels, each keeping STATES states of all of them in
// registers. Whoever compiles sets STATES, LANES, CHANNELS, PACK; states are padded to PADDED with A = B = C = 0,
// positions with delta = 0, so that neither contributes.
#pragma once

#include "tensors.cuh"

constexpr int PADDED = STATES * LANES;             // states
constexpr int BLOCK = THREADS / LANES * CHANNELS;  // channels
constexpr int UNROLL = 4;                          // positions; a divisor of CHUNK
static_assert(CHANNELS <= LANES && LANES <= WARP && CHUNK <= WARP && CHUNK % UNROLL == 0 && BLOCK % PACK == 0, "");

// Mirrored by ctypes in mambatrain/ops/native/cuda/selective_scan.py: the same fields in the same order.
struct ScanArguments {
    int64 rows, length, channels, states;
    View u, dt, z, B, C;              // z may be absent; u, dt, z (and grad_out) are aligned to PACK elements
    const float* A;                   // (E, N)
    const float* D;                   // (E,) or null
    const float* dt_bias;             // (E,) or null
    const float* initial_state;       // (B, E, N) or null
    const unsigned char* boundaries;  // (B, L) or null
    float* entries;                   // (B, chunks, E, PADDED), the state before each chunk; forward: or null
    // forward writes
    View out;
    float* final_state;  // (B, E, N)
    // backward reads
    View grad_out;            // may be absent
    const float* grad_state;  // (B, E, N) or null
    // backward writes
    View du, ddt, dz, dB, dC;  // dz as z; dB and dC contiguous
    float* dA;                 // (B, E, N), to be summed over rows
    float* dD;                 // (2, B, E): of D and of dt_bias, to be summed over rows
    float* dinitial;           // (B, E, N) or null
    float* partial;            // (slices, B, L, 2, PADDED): dB and dC of the channels of one block
    int64 slices;              // blocks that share a row
};
static_assert(sizeof(ScanArguments) == ARGUMENTS_BYTES, "the arguments differ from the caller's");

// ---- a chunk as items

// A thread's share of [CHUNK][SIZE * WIDTH] values: places column * WIDTH .. of positions t(0) .. t(COUNT - 1).
template <int SIZE, int WIDTH>
struct Items {
    static constexpr int STEP = THREADS / SIZE;  // positions
    static constexpr int COUNT = CHUNK > STEP ? CHUNK / STEP : 1;
    static_assert(SIZE <= THREADS, "");
    int column, first;

    DEVICE Items() : column(thread_index() % SIZE * WIDTH), first(thread_index() / SIZE) {}
    DEVICE int t(int i) const { return first + i * STEP; }
    DEVICE bool exists(int i) const { return CHUNK >= STEP || t(i) < CHUNK; }

    // Of `count` positions of a view from (row, begin) on, places first_column + column .. ; positions that are not
    // there are left as they are. A chunk is nearly always whole: then no position is compared with its end.
    template <class Values>
    DEVICE void load(Values (&to)[COUNT], const View& view, int64 row, int64 begin, int64 first_column,
                     int count) const {
        const Element* data = view.at(row, begin + first, first_column);
        const int64 step = STEP * view.time_stride;
        if (count == CHUNK) {
#pragma unroll
            for (int i = 0; i < COUNT; ++i)
                if (exists(i)) to[i] = *reinterpret_cast<const Values*>(data + i * step);
        } else {
#pragma unroll
            for (int i = 0; i < COUNT; ++i)
                if (t(i) < count) to[i] = *reinterpret_cast<const Values*>(data + i * step);
        }
    }
    template <class Values>
    DEVICE void store(const Values (&from)[COUNT], const View& view, int64 row, int64 begin, int64 first_column,
                      int count) const {
        Element* data = view.at(row, begin + first, first_column);
        const int64 step = STEP * view.time_stride;
        if (count == CHUNK) {
#pragma unroll
            for (int i = 0; i < COUNT; ++i)
                if (exists(i)) *reinterpret_cast<Values*>(data + i * step) = from[i];
        } else {
#pragma unroll
            for (int i = 0; i < COUNT; ++i)
                if (t(i) < count) *reinterpret_cast<Values*>(data + i * step) = from[i];
        }
    }
};

using ChannelItems = Items<BLOCK / PACK, PACK>;
using StateItems = Items<(PADDED < THREADS ? PADDED : THREADS), 1>;

// B or C of a chunk, in fp32: to[CHUNK][PADDED].
DEVICE void load_shared(float (&to)[CHUNK][PADDED], const View& view, int64 row, int64 begin, int count, int64 states) {
    const StateItems items;
#pragma unroll
    for (int n = items.column; n < PADDED; n += THREADS) {
        Elements<1> x[StateItems::COUNT] = {};
        items.load(x, view, row, begin, n < states ? n : 0, count);
#pragma unroll
        for (int i = 0; i < StateItems::COUNT; ++i)
            if (items.exists(i)) to[items.t(i)][n] = n < states ? x[i][0] : 0.0f;
    }
}

// Bit t: does a document start at position t of the chunk?
DEVICE unsigned find_starts(const ScanArguments& args, int64 row, int64 begin, int count) {
    const int t = thread_index() % WARP;
    return ballot(args.boundaries && t < count && args.boundaries[row * args.length + begin + t]);
}

DEVICE int positions_from(const ScanArguments& args, int64 begin) {
    return args.length - begin < CHUNK ? int(args.length - begin) : CHUNK;
}

// ---- channels in registers

// Where a thread stands among those that share channels.
struct Place {
    int lane, group;
    DEVICE Place() : lane(thread_index() % LANES), group(thread_index() / LANES) {}

    // The j-th channel of this thread, counted in the block. Neighbours take theirs in different orders, so that each
    // ends with the sum over the lanes of its own first one (sum_over_lanes), without choosing.
    DEVICE int channel(int j) const { return group * CHANNELS + (j ^ lane % CHANNELS); }
    DEVICE int first_state() const { return lane * STATES; }
    DEVICE bool writes() const { return lane < CHANNELS; }
    DEVICE Floats<STATES> read(const float (&row)[PADDED]) const {
        return *reinterpret_cast<const Floats<STATES>*>(&row[first_state()]);
    }
};

// x[0] becomes the sum over the lanes for channel(0), in every thread.
DEVICE void sum_over_lanes(float (&x)[CHANNELS]) {
#pragma unroll
    for (int offset = CHANNELS / 2; offset > 0; offset /= 2)
#pragma unroll
        for (int j = 0; j < offset; ++j)
            x[j] += exchange(x[j + offset], offset);
#pragma unroll
    for (int offset = CHANNELS; offset < LANES; offset *= 2)
        x[0] += exchange(x[0], offset);
}

// The states of one thread.
struct States {
    Floats<STATES> of[CHANNELS];

    DEVICE void clear() {
#pragma unroll
        for (int j = 0; j < CHANNELS; ++j)
            of[j] = {};
    }
    // From (E, N), or one row of (B, E, N); what is not there is 0.
    DEVICE void load(const float* from, const Place& place, int64 first, const ScanArguments& args, float scale = 1) {
#pragma unroll
        for (int j = 0; j < CHANNELS; ++j)
#pragma unroll
            for (int i = 0; i < STATES; ++i) {
                const int64 e = first + place.channel(j), n = place.first_state() + i;
                const bool exists = from && e < args.channels && n < args.states;
                of[j][i] = exists ? from[e * args.states + n] * scale : 0.0f;
            }
    }
    DEVICE void store(float* to, const Place& place, int64 first, const ScanArguments& args) const {
#pragma unroll
        for (int j = 0; j < CHANNELS; ++j)
#pragma unroll
            for (int i = 0; i < STATES; ++i) {
                const int64 e = first + place.channel(j), n = place.first_state() + i;
                if (e < args.channels && n < args.states) to[e * args.states + n] = of[j][i];
            }
    }
    DEVICE void store_entry(int64 row, int64 chunk, const Place& place, int64 first, const ScanArguments& args) const {
#pragma unroll
        for (int j = 0; j < CHANNELS; ++j)
            if (Floats<STATES>* entry = find_entry(row, chunk, place, first + place.channel(j), args)) *entry = of[j];
    }
    DEVICE void load_entry(int64 row, int64 chunk, const Place& place, int64 first, const ScanArguments& args) {
        clear();
#pragma unroll
        for (int j = 0; j < CHANNELS; ++j)
            if (const Floats<STATES>* entry = find_entry(row, chunk, place, first + place.channel(j), args))
                of[j] = *entry;
    }

  private:
    DEVICE static Floats<STATES>* find_entry(int64 row, int64 chunk, const Place& place, int64 channel,
                                             const ScanArguments& args) {
        const int64 chunks = (args.length + CHUNK - 1) / CHUNK,
                    index = (row * chunks + chunk) * args.channels + channel;
        if (channel >= args.channels) return nullptr;
        return reinterpret_cast<Floats<STATES>*>(args.entries + index * PADDED + place.first_state());
    }
};
