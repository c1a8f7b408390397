#include "parallel.h"
#include "selective_scan.h"

namespace {

// One chunk of one vector of channels.
struct ChannelInputs {
    Floats dt[CHUNK], dt_u[CHUNK], y[CHUNK];
};

// h = 2^(dt A2) h + dt u B;  y += C h, for NUM states from `h` on.
template <int NUM>
void advance(int length, const SharedInputs& shared, int64_t first, const Floats* A2, Floats* h, ChannelInputs& in,
             const Exp2& exp2) {
    Floats state[NUM], rate[NUM];
    for (int n = 0; n < NUM; ++n)
        state[n] = h[n], rate[n] = A2[n];
    for (int t = 0; t < length; ++t) {
        if (shared.starts[t])
            for (int n = 0; n < NUM; ++n)
                state[n] = Floats{};
        const float* B = &shared.B[t * shared.padded + first];
        const float* C = &shared.C[t * shared.padded + first];
        Floats dt = in.dt[t], dt_u = in.dt_u[t], even = {}, odd = {};
#pragma GCC unroll 16
        for (int n = 0; n < NUM; ++n) {
            state[n] = exp2(dt * rate[n]) * state[n] + dt_u * B[n];
            (n % 2 ? odd : even) += state[n] * C[n];
        }
        in.y[t] += even + odd;  // short sums, then their sum: less is lost where states are many
    }
    for (int n = 0; n < NUM; ++n)
        h[n] = state[n];
}

struct ForwardWorker {
    const ScanArguments& args;
    int64_t span;  // vectors in one item
    SharedInputs shared;
    int64_t padded;
    Array<Floats> A2, h;  // [span][padded states]
    ChannelInputs in;
    Exp2 exp2;

    ForwardWorker(const ScanArguments& args, int64_t span)
        : args(args),
          span(span),
          shared(args),
          padded(args.padded_states()),
          A2(allocate<Floats>(span * padded)),
          h(allocate<Floats>(span * padded)) {}

    void operator()(int64_t item) {
        const int64_t spans = (args.vectors() + span - 1) / span, row = item / spans, first = item % spans * span;
        const int64_t count = args.vectors() - first < span ? args.vectors() - first : span;
        const int64_t row_size = args.channels * args.states;
        for (int64_t v = 0; v < count; ++v) {
            gather_states(args.A, &A2[v * padded], first + v, args, LOG2_E);
            gather_states(args.initial_state ? args.initial_state + row * row_size : nullptr, &h[v * padded], first + v,
                          args);
        }
        for (int64_t chunk = 0; chunk < args.chunks(); ++chunk) {
            shared.read(args, row, chunk);
            for (int64_t v = 0; v < count; ++v)
                scan_chunk(row, chunk, first + v, &A2[v * padded], &h[v * padded]);
        }
        for (int64_t v = 0; v < count; ++v)
            scatter_states(&h[v * padded], args.final_state + row * row_size, first + v, args);
    }

  private:
    void scan_chunk(int64_t row, int64_t chunk, int64_t vector, const Floats* A2, Floats* h) {
        const int64_t channel = vector * WIDTH, begin = chunk * CHUNK;
        const int lanes = args.lanes(vector), length = args.chunk_length(chunk);
        if (args.entries) std::memcpy(args.entry(row, vector, chunk), h, padded * sizeof(Floats));
        const Floats bias = args.dt_bias ? load(args.dt_bias, FP32, channel, lanes) : Floats{};
        const Floats D = args.D ? load(args.D, FP32, channel, lanes) : Floats{};
        const Column u = args.u.column(row, begin, channel, lanes), raw = args.dt.column(row, begin, channel, lanes);
        const Column out = args.out.column(row, begin, channel, lanes),
                     gate = args.z.column(row, begin, channel, lanes);
        for (int t = 0; t < length; ++t) {
            u.prefetch(t + CHUNK), raw.prefetch(t + CHUNK), gate.prefetch(t + CHUNK);
            Floats dt = softplus(raw[t] + bias, exp2).value;
            in.dt[t] = dt;
            in.dt_u[t] = dt * u[t];
            in.y[t] = D * u[t];
        }
        int64_t n = 0;
        for (; n + 16 <= padded; n += 16)
            advance<16>(length, shared, n, A2 + n, h + n, in, exp2);
        if (n < padded) advance<8>(length, shared, n, A2 + n, h + n, in, exp2);
        if (args.z.data)
            for (int t = 0; t < length; ++t)
                out.set(t, in.y[t] * (gate[t] * sigmoid(gate[t], exp2)));
        else
            for (int t = 0; t < length; ++t)
                out.set(t, in.y[t]);
    }
};

}  // namespace

extern "C" EXPORT void selective_scan_forward(const ScanArguments* args) {
    const int64_t threads = threads_worth(args->state_updates(), args->num_threads);
    const int64_t span = vectors_per_item(*args, threads, 4);
    share(args->rows * ((args->vectors() + span - 1) / span), threads, [=] { return ForwardWorker(*args, span); });
}
