#include "selective_scan_backward.cuh"

constexpr int COUNT = ChannelItems::COUNT;

// What the items of a chunk read, before it is needed.
struct Inputs {
    Elements<PACK> u[COUNT] = {}, dt[COUNT] = {}, z[COUNT] = {}, g[COUNT] = {};

    DEVICE void load(const ScanArguments& args, const ChannelItems& items, int64 row, int64 begin, int64 channel) {
        if (begin < 0) return;
        const int count = positions_from(args, begin);
        items.load(u, args.u, row, begin, channel, count);
        items.load(dt, args.dt, row, begin, channel, count);
        if (args.z.data) items.load(z, args.z, row, begin, channel, count);
        if (args.grad_out.data) items.load(g, args.grad_out, row, begin, channel, count);
    }
};

// What the items keep of a chunk until its states have been gone through.
struct Kept {
    float u[COUNT][PACK], slope[COUNT][PACK], gy[COUNT][PACK], dz_over_y[COUNT][PACK];

    DEVICE void prepare(Shared& shared, const ChannelItems& items, const Inputs& inputs, const float (&bias)[PACK],
                        bool gated, int count) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            if (!items.exists(i)) continue;
#pragma unroll
            for (int k = 0; k < PACK; ++k) {
                const float z = inputs.z[i][k], s = sigmoid(z), g = inputs.g[i][k];
                const Softplus delta = softplus(inputs.dt[i][k] + bias[k]);
                u[i][k] = inputs.u[i][k];
                slope[i][k] = delta.slope;
                gy[i][k] = gated ? g * (z * s) : g;
                dz_over_y[i][k] = g * (s * fma(z, 1.0f - s, 1.0f));
                Position at = {};
                if (items.t(i) < count) at = {delta.value, delta.value * u[i][k], gy[i][k], 0.0f};
                shared.at[items.t(i)][items.column + k] = at;
            }
        }
    }
};

// dB and dC of the block's channels at each position: the sum over the threads that hold the same states.
DEVICE void sum_lines(const Shared& shared, const ScanArguments& args, int64 slice, int64 row, int64 begin, int count,
                      bool first) {
    float* partial = args.partial + ((slice * args.rows + row) * args.length + begin) * 2 * PADDED;
#pragma unroll
    for (int i = thread_index(); i < CHUNK * 2 * LANES; i += THREADS) {
        const int t = i / (2 * LANES), half = i / LANES % 2, lane = i % LANES;
        auto& to = *reinterpret_cast<Floats<STATES>*>(partial + (t * 2 + half) * PADDED + lane * STATES);
        if (t >= count) continue;
        Floats<STATES> sum = {};
        if (!first) sum = to;
#pragma unroll
        for (int group = 0; group < THREADS / LANES; ++group) {
            const Floats<STATES> x = shared.lines[t][half][group * LANES + lane];
#pragma unroll
            for (int n = 0; n < STATES; ++n)
                sum[n] += x[n];
        }
        to = sum;
    }
}

// What the items of a chunk return; dD and dbias gather over the chunks.
DEVICE void write_items(const Shared& shared, const ScanArguments& args, const ChannelItems& items, const Kept& kept,
                        int64 row, int64 begin, int64 channel, int count, const float (&D)[PACK], float (&dD)[PACK],
                        float (&dbias)[PACK]) {
    Elements<PACK> du[COUNT], ddt[COUNT], dz[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        if (!items.exists(i) || items.t(i) >= count) continue;
#pragma unroll
        for (int k = 0; k < PACK; ++k) {
            const auto [q1, q2] = shared.sums[items.t(i)][items.column + k];
            const Position at = shared.at[items.t(i)][items.column + k];
            const float u = kept.u[i][k];
            const float raw = fma(q1, u, q2 * LN_2) * kept.slope[i][k];
            du[i].set(k, fma(D[k], kept.gy[i][k], q1 * at.delta));
            ddt[i].set(k, raw);
            dz[i].set(k, kept.dz_over_y[i][k] * fma(D[k], u, at.y));
            dD[k] = fma(kept.gy[i][k], u, dD[k]);
            dbias[k] += raw;
        }
    }
    items.store(du, args.du, row, begin, channel, count);
    items.store(ddt, args.ddt, row, begin, channel, count);
    if (args.dz.data) items.store(dz, args.dz, row, begin, channel, count);
}

// sums[STEP][BLOCK] of the items: the sum over the first index, in its order, to one row of (B, E).
DEVICE void sum_items(float* sums, const ChannelItems& items, const float (&x)[PACK], float* to, int64 first,
                      const ScanArguments& args) {
    sync_block();
#pragma unroll
    for (int k = 0; k < PACK; ++k)
        sums[items.first * BLOCK + items.column + k] = x[k];
    sync_block();
    if (thread_index() >= BLOCK || first + thread_index() >= args.channels) return;
    float sum = 0.0f;
    for (int i = 0; i < ChannelItems::STEP; ++i)
        sum += sums[i * BLOCK + thread_index()];
    to[first + thread_index()] = sum;
}

// The channels from `first` on, of one row.
DEVICE void differentiate(Shared& shared, const ScanArguments& args, int64 slice, int64 row, int64 first,
                          bool first_of_slice) {
    const Place place;
    const ChannelItems items;
    const bool exists = first + items.column < args.channels;
    const int64 channel = exists ? first + items.column : 0;  // where there is none, the reads must be allowed
    const int64 row_states = row * args.channels * args.states;
    float bias[PACK], D[PACK], dD[PACK] = {}, dbias[PACK] = {};
#pragma unroll
    for (int k = 0; k < PACK; ++k) {
        bias[k] = args.dt_bias ? args.dt_bias[channel + k] : 0.0f;
        D[k] = args.D ? args.D[channel + k] : 0.0f;
    }
    States rate, d, dA;
    rate.load(args.A, place, first, args, LOG2_E);
    d.load(args.grad_state ? args.grad_state + row_states : nullptr, place, first, args);
    dA.clear();
    Inputs inputs;
    const int64 last = (args.length - 1) / CHUNK * CHUNK;
    if (args.length > 0) inputs.load(args, items, row, last, channel);
#pragma unroll 1
    for (int64 begin = last; begin >= 0 && args.length > 0; begin -= CHUNK) {
        const int count = positions_from(args, begin);
        States h;
        h.load_entry(row, begin / CHUNK, place, first, args);
        load_shared(shared.B, args.B, row, begin, count, args.states);
        load_shared(shared.C, args.C, row, begin, count, args.states);
        const unsigned starts = find_starts(args, row, begin, count);
        Kept kept;
        kept.prepare(shared, items, inputs, bias, args.z.data, exists ? count : 0);
        sync_block();
        inputs.load(args, items, row, begin - CHUNK, channel);  // comes while the states are gone through
        if (starts) {
            recompute<true>(shared, place, count, starts, rate, h);
            go_back<true>(shared, place, count, starts, rate, h, d, dA);
        } else {
            recompute<false>(shared, place, count, starts, rate, h);
            go_back<false>(shared, place, count, starts, rate, h, d, dA);
        }
        sync_block();
        sum_lines(shared, args, slice, row, begin, count, first_of_slice);
        if (exists) write_items(shared, args, items, kept, row, begin, channel, count, D, dD, dbias);
    }
    dA.store(args.dA + row_states, place, first, args);
    if (args.dinitial) d.store(args.dinitial + row_states, place, first, args);
    float* sums = reinterpret_cast<float*>(&shared);
    sum_items(sums, items, dD, args.dD + row * args.channels, first, args);
    sum_items(sums, items, dbias, args.dD + (args.rows + row) * args.channels, first, args);
    sync_block();
}

// A block goes through the groups of channels of its slice one after another, so that there are few partial sums.
KERNEL(2) selective_scan_backward(ARGUMENTS ScanArguments args) {
    Shared& shared = *static_cast<Shared*>(shared_memory());
    const int64 row = block_index() / args.slices, slice = block_index() % args.slices;
    const int64 groups = (args.channels + BLOCK - 1) / BLOCK, step = (groups + args.slices - 1) / args.slices;
    const int64 end = (slice + 1) * step < groups ? (slice + 1) * step : groups;
    for (int64 group = slice * step; group < end; ++group)
        differentiate(shared, args, slice, row, group * BLOCK, group == slice * step);
}

// dB and dC: the slices' sums, in their order. A thread takes one state at one position.
KERNEL(4) sum_slices(ARGUMENTS ScanArguments args) {
    const int64 index = block_index() * THREADS + thread_index();
    const int64 n = index % args.states, half = index / args.states % 2, position = index / args.states / 2;
    if (position >= args.rows * args.length) return;
    const float* partial = args.partial + (position * 2 + half) * PADDED + n;
    float sum = 0.0f;
#pragma unroll 4
    for (int64 slice = 0; slice < args.slices; ++slice)
        sum += partial[slice * args.rows * args.length * 2 * PADDED];
    Elements<1> x;
    x.set(0, sum);
    const View& to = half == 0 ? args.dB : args.dC;
    *reinterpret_cast<Elements<1>*>(to.at(0, position, n)) = x;
}
