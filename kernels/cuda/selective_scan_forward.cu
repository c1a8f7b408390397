#include "selective_scan.cuh"

// One channel at one position.
struct alignas(8) Position {
    float delta, delta_u;
};

struct Shared {
    float B[CHUNK][PADDED], C[CHUNK][PADDED];
    Position at[CHUNK][BLOCK];
    float y[CHUNK][BLOCK];
};
static_assert(sizeof(Shared) == SHARED_BYTES, "the shared memory differs from what the caller sets aside");

constexpr int COUNT = ChannelItems::COUNT;

// What the items of a chunk read, before it is needed.
struct Inputs {
    Elements<PACK> u[COUNT] = {}, dt[COUNT] = {}, z[COUNT] = {};

    DEVICE void load(const ScanArguments& args, const ChannelItems& items, int64 row, int64 begin, int64 channel) {
        if (begin >= args.length) return;
        const int count = positions_from(args, begin);
        items.load(u, args.u, row, begin, channel, count);
        items.load(dt, args.dt, row, begin, channel, count);
        if (args.z.data) items.load(z, args.z, row, begin, channel, count);
    }
};

// h = 2^(delta rate) h + delta u B;  y = C h. UNROLL positions are read before any is written: what is written might,
// for all the compiler knows, be what is read next, and it would wait.
template <bool STARTS>
DEVICE void scan(Shared& shared, const Place& place, int count, unsigned starts, const States& rate, States& h) {
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
            if (STARTS && (starts >> (begin + i) & 1)) h.clear();
#pragma unroll
            for (int j = 0; j < CHANNELS; ++j) {
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
            if (place.writes()) shared.y[begin + i][place.channel(0)] = y[i][0];
    }
}

KERNEL(3) selective_scan_forward(ARGUMENTS ScanArguments args) {
    Shared& shared = *static_cast<Shared*>(shared_memory());
    const Place place;
    const ChannelItems items;
    const int64 groups = (args.channels + BLOCK - 1) / BLOCK;
    const int64 row = block_index() / groups, first = block_index() % groups * BLOCK;
    const bool exists = first + items.column < args.channels;
    const int64 channel = exists ? first + items.column : 0;  // where there is none, the reads must be allowed
    const int64 row_states = row * args.channels * args.states;
    float bias[PACK], D[PACK];
#pragma unroll
    for (int k = 0; k < PACK; ++k) {
        bias[k] = args.dt_bias ? args.dt_bias[channel + k] : 0.0f;
        D[k] = args.D ? args.D[channel + k] : 0.0f;
    }
    States rate, h;
    rate.load(args.A, place, first, args, LOG2_E);
    h.load(args.initial_state ? args.initial_state + row_states : nullptr, place, first, args);
    Inputs inputs;
    inputs.load(args, items, row, 0, channel);
#pragma unroll 1
    for (int64 begin = 0; begin < args.length; begin += CHUNK) {
        const int count = positions_from(args, begin);
        load_shared(shared.B, args.B, row, begin, count, args.states);
        load_shared(shared.C, args.C, row, begin, count, args.states);
        const unsigned starts = find_starts(args, row, begin, count);
        float skip[COUNT][PACK], gate[COUNT][PACK];
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            if (!items.exists(i)) continue;
#pragma unroll
            for (int k = 0; k < PACK; ++k) {
                const float u = inputs.u[i][k], z = inputs.z[i][k], delta = softplus(inputs.dt[i][k] + bias[k]).value;
                const bool exists = items.t(i) < count;
                shared.at[items.t(i)][items.column + k] = {exists ? delta : 0.0f, exists ? delta * u : 0.0f};
                skip[i][k] = D[k] * u;
                gate[i][k] = args.z.data ? z * sigmoid(z) : 1.0f;
            }
        }
        sync_block();
        inputs.load(args, items, row, begin + CHUNK, channel);  // comes while the scan runs
        if (args.entries) h.store_entry(row, begin / CHUNK, place, first, args);
        if (starts)
            scan<true>(shared, place, count, starts, rate, h);
        else
            scan<false>(shared, place, count, starts, rate, h);
        sync_block();
        Elements<PACK> out[COUNT];
#pragma unroll
        for (int i = 0; i < COUNT; ++i)
#pragma unroll
            for (int k = 0; k < PACK; ++k)
                if (items.exists(i)) out[i].set(k, (shared.y[items.t(i)][items.column + k] + skip[i][k]) * gate[i][k]);
        if (exists) items.store(out, args.out, row, begin, channel, count);
    }
    h.store(args.final_state + row_states, place, first, args);
}
