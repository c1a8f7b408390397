#include "parallel.h"
#include "ssd.h"

namespace {

struct ForwardWorker {
    const SSDArguments& args;
    int64_t padded_states, padded_channels;
    GroupInputs shared;
    HeadInputs in;
    Array<float> x, dt_x, y;  // [SSD_CHUNK][padded channels]
    Array<float> h;           // [padded channels][padded states]
    Exp2 exp2;

    explicit ForwardWorker(const SSDArguments& args)
        : args(args),
          padded_states(args.padded_states()),
          padded_channels(args.padded_channels()),
          shared(args),
          x(allocate<float>(SSD_CHUNK * padded_channels)),
          dt_x(allocate<float>(SSD_CHUNK * padded_channels)),
          y(allocate<float>(SSD_CHUNK * padded_channels)),
          h(allocate<float>(padded_channels * padded_states)) {}

    void operator()(int64_t item) {  // a head of a row
        const int64_t row = item / args.heads, head = item % args.heads;
        read_state(args.initial_state ? args.initial_state + item * args.state_size() : nullptr, &h[0], args);
        for (int64_t chunk = 0; chunk < args.chunks(); ++chunk) {
            if (args.entries)
                write_state(&h[0], args.entries + (item * args.chunks() + chunk) * args.state_size(), args);
            scan_chunk(row, head, chunk);
        }
        write_state(&h[0], args.final_state + item * args.state_size(), args);
    }

  private:
    void scan_chunk(int64_t row, int64_t head, int64_t chunk) {
        const int64_t begin = chunk * SSD_CHUNK;
        const int length = args.chunk_length(chunk);
        shared.read(args, row, head / args.heads_per_group(), chunk);
        in.read(args, row, head, chunk, exp2);
        read_positions(args.x, row, begin, head, args.channels, length, &x[0], padded_channels);
        const float D = args.D ? args.D[head] : 0.0f;
        for (int t = 0; t < length; ++t)
            for (int64_t p = t * padded_channels; p < (t + 1) * padded_channels; p += WIDTH) {
                store_floats(&dt_x[p], load_floats(&x[p]) * in.dt[t]);
                store_floats(&y[p], load_floats(&x[p]) * D);
            }
        int64_t n = 0;
        for (; n + TILE_VECTORS * WIDTH <= padded_states; n += TILE_VECTORS * WIDTH)
            for (int64_t p = 0; p < padded_channels; p += TILE_CHANNELS)
                advance<TILE_VECTORS>(length, p, n);
        for (; n < padded_states; n += WIDTH)
            for (int64_t p = 0; p < padded_channels; p += TILE_CHANNELS)
                advance<1>(length, p, n);
        for (int64_t p = 0; p < args.channels; p += WIDTH) {
            const int count = args.channels - p < WIDTH ? int(args.channels - p) : WIDTH;
            const Column out = args.out.column(row, begin, head, p, count);
            for (int t = 0; t < length; ++t)
                out.set(t, load_floats(&y[t * padded_channels + p]));
        }
    }

    // h = decay h + (dt x) B;  y += C h, for a tile of channels from p and states from n on.
    template <int NUM>
    NOINLINE void advance(int length, int64_t p, int64_t n) {
        Floats state[NUM][TILE_CHANNELS];
        float* tile = &h[p * padded_states + n];
        for (int j = 0; j < NUM; ++j)
            for (int i = 0; i < TILE_CHANNELS; ++i)
                state[j][i] = load_floats(tile + i * padded_states + j * WIDTH);
        for (int t = 0; t < length; ++t) {
            if (shared.starts[t])
                for (int j = 0; j < NUM; ++j)
                    for (int i = 0; i < TILE_CHANNELS; ++i)
                        state[j][i] = Floats{};
            const float *B = &shared.B[t * padded_states + n], *C = &shared.C[t * padded_states + n];
            const float* w = &dt_x[t * padded_channels + p];
            const Floats decay = broadcast(in.decay[t]);
            Floats sums[TILE_CHANNELS] = {};
#pragma GCC unroll 16
            for (int j = 0; j < NUM; ++j) {
                const Floats b = load_floats(B + j * WIDTH), c = load_floats(C + j * WIDTH);
#pragma GCC unroll 16
                for (int i = 0; i < TILE_CHANNELS; ++i) {
                    state[j][i] = decay * state[j][i] + w[i] * b;
                    sums[i] += state[j][i] * c;
                }
            }
            add_lane_sums(sums, &y[t * padded_channels + p]);
        }
        for (int j = 0; j < NUM; ++j)
            for (int i = 0; i < TILE_CHANNELS; ++i)
                store_floats(tile + i * padded_states + j * WIDTH, state[j][i]);
    }
};

}  // namespace

extern "C" EXPORT void ssd_forward(const SSDArguments* args) {
    const int64_t threads = threads_worth(args->state_updates() / 2, args->num_threads);
    share(args->rows * args->heads, threads, [=] { return ForwardWorker(*args); });
}
