#include "parallel.h"
#include "ssd.h"

namespace {

// Heads of one group in an item of work: their dB and dC are added up before they are written. With as many as here the
// sums of all items, (B, L, items a row, 2 N), are never larger than (B, L, H, P).
int64_t heads_per_item(const SSDArguments& args) {
    const int64_t enough = (2 * args.padded_states() + args.channels - 1) / args.channels;
    return enough < args.heads_per_group() ? enough : args.heads_per_group();
}

int64_t items_per_group(const SSDArguments& args) {
    return (args.heads_per_group() + heads_per_item(args) - 1) / heads_per_item(args);
}

struct BackwardWorker {
    const SSDArguments& args;
    float* partial_BC;     // (B, groups, items a group, L, 2, padded states)
    float* partial_heads;  // (B, H, 3): dA, dD, the bias's gradient
    int64_t padded_states, padded_channels;
    GroupInputs shared;
    HeadInputs in;
    Array<float> x, dt_x, gy, q1;  // [SSD_CHUNK][padded channels]
    Array<float> adjoint;          // [heads of the item][padded channels][padded states]
    Array<float> entry;            // [padded channels][padded states]
    Array<float> dBC;              // [SSD_CHUNK][2][padded states], of one head: short sums lose less than one long one
    Array<double> sums;            // [heads of the item][3]
    Floats q2[SSD_CHUNK];          // lane by lane
    // h[t] is the tile's state before position t, h[length] the last
    Floats h[SSD_CHUNK + 1][TILE_VECTORS][TILE_CHANNELS];
    Exp2 exp2;

    BackwardWorker(const SSDArguments& args, float* partial_BC, float* partial_heads)
        : args(args),
          partial_BC(partial_BC),
          partial_heads(partial_heads),
          padded_states(args.padded_states()),
          padded_channels(args.padded_channels()),
          shared(args),
          x(allocate<float>(SSD_CHUNK * padded_channels)),
          dt_x(allocate<float>(SSD_CHUNK * padded_channels)),
          gy(allocate<float>(SSD_CHUNK * padded_channels)),
          q1(allocate<float>(SSD_CHUNK * padded_channels)),
          adjoint(allocate<float>(heads_per_item(args) * padded_channels * padded_states)),
          entry(allocate<float>(padded_channels * padded_states)),
          dBC(allocate<float>(SSD_CHUNK * 2 * padded_states)),
          sums(allocate<double>(heads_per_item(args) * 3)) {}

    void operator()(int64_t item) {
        const int64_t per_group = items_per_group(args), group = item / per_group % args.groups;
        const int64_t row = item / per_group / args.groups, per_item = heads_per_item(args);
        const int64_t first = group * args.heads_per_group() + item % per_group * per_item;
        const int64_t end = (group + 1) * args.heads_per_group();
        const int64_t count = end - first < per_item ? end - first : per_item;
        const int64_t size = padded_channels * padded_states;
        for (int64_t i = 0; i < count; ++i) {
            const int64_t index = (row * args.heads + first + i) * args.state_size();
            read_state(args.grad_state ? args.grad_state + index : nullptr, &adjoint[i * size], args);
            for (int k = 0; k < 3; ++k)
                sums[3 * i + k] = 0.0;
        }
        for (int64_t chunk = args.chunks() - 1; chunk >= 0; --chunk) {
            float* to = partial_BC + (item * args.length + chunk * SSD_CHUNK) * 2 * padded_states;
            const int64_t to_size = args.chunk_length(chunk) * 2 * padded_states;
            shared.read(args, row, group, chunk);
            for (int64_t i = 0; i < count; ++i) {
                std::memset(&dBC[0], 0, to_size * sizeof(float));
                go_back(row, first + i, chunk, &adjoint[i * size], &sums[3 * i]);
                for (int64_t j = 0; j < to_size; j += WIDTH)
                    store_floats(to + j, i ? load_floats(to + j) + load_floats(&dBC[j]) : load_floats(&dBC[j]));
            }
        }
        for (int64_t i = 0; i < count; ++i) {
            const int64_t index = row * args.heads + first + i;
            for (int k = 0; k < 3; ++k)
                partial_heads[3 * index + k] = float(sums[3 * i + k]);
            if (args.dinitial) write_state(&adjoint[i * size], args.dinitial + index * args.state_size(), args);
        }
    }

  private:
    void go_back(int64_t row, int64_t head, int64_t chunk, float* adjoint, double* sums) {
        const int64_t begin = chunk * SSD_CHUNK;
        const int length = args.chunk_length(chunk);
        in.read(args, row, head, chunk, exp2);
        read_positions(args.x, row, begin, head, args.channels, length, &x[0], padded_channels);
        read_positions(args.grad_out, row, begin, head, args.channels, length, &gy[0], padded_channels);
        read_state(args.entries + ((row * args.heads + head) * args.chunks() + chunk) * args.state_size(), &entry[0],
                   args);
        for (int t = 0; t < length; ++t) {
            q2[t] = Floats{};
            for (int64_t p = t * padded_channels; p < (t + 1) * padded_channels; p += WIDTH) {
                store_floats(&dt_x[p], load_floats(&x[p]) * in.dt[t]);
                store_floats(&q1[p], Floats{});
            }
        }
        int64_t n = 0;
        for (; n + TILE_VECTORS * WIDTH <= padded_states; n += TILE_VECTORS * WIDTH)
            go_back_through<TILE_VECTORS>(length, n, adjoint);
        for (; n < padded_states; n += WIDTH)
            go_back_through<1>(length, n, adjoint);
        write_channels(row, head, begin, length, sums);
    }

    // NUM vectors of states from n on, all channels.
    template <int NUM>
    void go_back_through(int length, int64_t n, float* adjoint) {
        for (int64_t p = 0; p < padded_channels; p += TILE_CHANNELS) {
            recompute<NUM>(length, p, n);
            reverse<NUM>(length, p, n, adjoint + p * padded_states + n);
        }
    }

    template <int NUM>
    NOINLINE void recompute(int length, int64_t p, int64_t n) {
        Floats state[NUM][TILE_CHANNELS];
        const float* tile = &entry[p * padded_states + n];
        for (int j = 0; j < NUM; ++j)
            for (int i = 0; i < TILE_CHANNELS; ++i)
                h[0][j][i] = state[j][i] = load_floats(tile + i * padded_states + j * WIDTH);
        for (int t = 0; t < length; ++t) {
            if (shared.starts[t])
                for (int j = 0; j < NUM; ++j)
                    for (int i = 0; i < TILE_CHANNELS; ++i)
                        state[j][i] = Floats{};
            const float *B = &shared.B[t * padded_states + n], *w = &dt_x[t * padded_channels + p];
            const Floats decay = broadcast(in.decay[t]);
#pragma GCC unroll 16
            for (int j = 0; j < NUM; ++j) {
                const Floats b = load_floats(B + j * WIDTH);
#pragma GCC unroll 16
                for (int i = 0; i < TILE_CHANNELS; ++i)
                    h[t + 1][j][i] = state[j][i] = decay * state[j][i] + w[i] * b;
            }
        }
    }

    template <int NUM>
    NOINLINE void reverse(int length, int64_t p, int64_t n, float* adjoint) {
        Floats d[NUM][TILE_CHANNELS];
        for (int j = 0; j < NUM; ++j)
            for (int i = 0; i < TILE_CHANNELS; ++i)
                d[j][i] = load_floats(adjoint + i * padded_states + j * WIDTH);
        for (int t = length - 1; t >= 0; --t) {
            if (shared.starts[t])
                step_back<NUM, true>(t, p, n, d);
            else
                step_back<NUM, false>(t, p, n, d);
        }
        for (int j = 0; j < NUM; ++j)
            for (int i = 0; i < TILE_CHANNELS; ++i)
                store_floats(adjoint + i * padded_states + j * WIDTH, d[j][i]);
    }

    // One position. Where a document starts, nothing reaches the state before it: left out, not multiplied by 0.
    template <int NUM, bool STARTS>
    INLINE void step_back(int t, int64_t p, int64_t n, Floats (&d)[NUM][TILE_CHANNELS]) {
        const float *B = &shared.B[t * padded_states + n], *C = &shared.C[t * padded_states + n];
        const float *w = &dt_x[t * padded_channels + p], *g = &gy[t * padded_channels + p];
        const Floats decay = broadcast(in.decay[t]);
        Floats through_u[TILE_CHANNELS] = {}, through_decay = {};
#pragma GCC unroll 16
        for (int j = 0; j < NUM; ++j) {
            const Floats b = load_floats(B + j * WIDTH), c = load_floats(C + j * WIDTH);
            float *to_B = &dBC[t * 2 * padded_states + n + j * WIDTH], *to_C = to_B + padded_states;
            Floats dB = load_floats(to_B), dC = load_floats(to_C);
#pragma GCC unroll 16
            for (int i = 0; i < TILE_CHANNELS; ++i) {
                d[j][i] += g[i] * c;
                dC += g[i] * h[t + 1][j][i];
                dB += w[i] * d[j][i];
                through_u[i] += d[j][i] * b;
                d[j][i] = STARTS ? Floats{} : d[j][i] * decay;
                if (!STARTS) through_decay += d[j][i] * h[t][j][i];
            }
            store_floats(to_B, dB);
            store_floats(to_C, dC);
        }
        add_lane_sums(through_u, &q1[t * padded_channels + p]);
        q2[t] += through_decay;
    }

    void write_channels(int64_t row, int64_t head, int64_t begin, int length, double* sums) {
        alignas(64) float to_decay[SSD_CHUNK] = {};
        for (int t = length; t < SSD_CHUNK; ++t)
            q2[t] = Floats{};
        for (int t = 0; t < length; t += 4)
            add_lane_sums(q2 + t, to_decay + t);
        const float D = args.D ? args.D[head] : 0.0f, A = args.A[head];
        Floats to_dt[SSD_CHUNK], to_D = {};
        for (int t = 0; t < SSD_CHUNK; ++t)
            to_dt[t] = Floats{};
        for (int64_t p = 0; p < args.channels; p += WIDTH) {
            const int count = args.channels - p < WIDTH ? int(args.channels - p) : WIDTH;
            const Column dx = args.dx.column(row, begin, head, p, count);
            for (int t = 0; t < length; ++t) {
                const int64_t index = t * padded_channels + p;
                const Floats u = load_floats(&x[index]), q = load_floats(&q1[index]), g = load_floats(&gy[index]);
                dx.set(t, D * g + in.dt[t] * q);
                to_dt[t] += q * u;
                to_D += g * u;
            }
        }
        alignas(64) float by_u[SSD_CHUNK] = {};
        for (int t = 0; t < length; t += 4)
            add_lane_sums(to_dt + t, by_u + t);
        const Column ddt = args.ddt.column(row, begin, head, 1);
        for (int t = 0; t < length; ++t) {
            const float draw = (A * to_decay[t] + by_u[t]) * in.slope[t];
            ddt.set(t, broadcast(draw));
            sums[0] += to_decay[t] * in.dt[t];
            sums[2] += draw;
        }
        for (int lane = 0; lane < WIDTH; ++lane)
            sums[1] += to_D[lane];
    }
};

// dB and dC of some positions of one group: the items' sums, in their order.
void sum_items(const SSDArguments& args, const float* partial_BC, int64_t row, int64_t group, int64_t begin,
               int length) {
    const int64_t padded = args.padded_states(), items = items_per_group(args);
    const float* first = partial_BC + (row * args.groups + group) * items * args.length * 2 * padded;
    for (int part = 0; part < 2; ++part)
        for (int64_t n = 0; n < args.states; n += WIDTH) {
            const int count = args.states - n < WIDTH ? int(args.states - n) : WIDTH;
            const Column to = (part ? args.dC : args.dB).column(row, begin, group, n, count);
            for (int t = 0; t < length; ++t) {
                Floats sum = {};
                for (int64_t item = 0; item < items; ++item)
                    sum += load_floats(first + ((item * args.length + begin + t) * 2 + part) * padded + n);
                to.set(t, sum);
            }
        }
}

}  // namespace

extern "C" EXPORT void ssd_backward(const SSDArguments* arguments) {
    const SSDArguments& args = *arguments;
    const int64_t threads = threads_worth(2 * args.state_updates(), args.num_threads);
    const int64_t items = args.rows * args.groups * items_per_group(args);
    Array<float> partial_BC = allocate<float>(items * args.length * 2 * args.padded_states());
    Array<float> partial_heads = allocate<float>(args.rows * args.heads * 3);
    float *BC = partial_BC.get(), *by_head = partial_heads.get();
    share(items, threads, [=, &args] { return BackwardWorker(args, BC, by_head); });
    share(args.rows * args.groups * args.chunks(), threads, [=, &args] {
        return [=, &args](int64_t item) {
            const int64_t chunk = item % args.chunks(), group = item / args.chunks() % args.groups;
            sum_items(args, BC, item / args.chunks() / args.groups, group, chunk * SSD_CHUNK, args.chunk_length(chunk));
        };
    });
    for (int64_t head = 0; head < args.heads; ++head) {
        float* to[3] = {args.dA, args.dD, args.dbias};
        for (int k = 0; k < 3; ++k) {
            to[k][head] = 0.0f;
            for (int64_t row = 0; row < args.rows; ++row)
                to[k][head] += by_head[3 * (row * args.heads + head) + k];
        }
    }
}
