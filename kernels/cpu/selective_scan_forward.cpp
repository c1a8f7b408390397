#include "parallel.h"
#include "selective_scan.h"

namespace {

constexpr int VECTORS_PER_ITEM = 256 / (4 * WIDTH);  // 256 bytes of each position: whole cache lines, few pages

// One chunk of one vector of channels.
struct ChannelInputs {
    Floats dt[CHUNK], dt_u[CHUNK], y[CHUNK];
};

// h = 2^(dt A2) h + dt u B;  y += C h, for NUM states from `h` on.
template <int NUM>
void advance(int length, const SharedInputs& shared, int64_t first, const Floats* A2, Floats* h, ChannelInputs& in,
             const Exp2& exp2) {
    Floats state[NUM], rate[NUM];
    for (int n = 0; n < NUM; ++n) state[n] = h[n], rate[n] = A2[n];
    for (int t = 0; t < length; ++t) {
        if (shared.starts[t])
            for (int n = 0; n < NUM; ++n) state[n] = Floats{};
        const float* B = &shared.B[t * shared.padded + first];
        const float* C = &shared.C[t * shared.padded + first];
        Floats dt = in.dt[t], dt_u = in.dt_u[t], even = in.y[t], odd = {};
#pragma GCC unroll 16
        for (int n = 0; n < NUM; ++n) {
            state[n] = exp2(dt * rate[n]) * state[n] + dt_u * B[n];
            (n % 2 ? odd : even) += state[n] * C[n];
        }
        in.y[t] = even + odd;
    }
    for (int n = 0; n < NUM; ++n) h[n] = state[n];
}

struct ForwardWorker {
    const ScanArguments& args;
    SharedInputs shared;
    int64_t padded;
    Array<Floats> A2, h;  // [VECTORS_PER_ITEM][padded states]
    ChannelInputs in;
    Exp2 exp2;

    explicit ForwardWorker(const ScanArguments& args)
        : args(args),
          shared(args),
          padded(args.padded_states()),
          A2(allocate<Floats>(VECTORS_PER_ITEM * padded)),
          h(allocate<Floats>(VECTORS_PER_ITEM * padded)) {}

    void operator()(int64_t item) {
        int64_t groups = (args.vectors() + VECTORS_PER_ITEM - 1) / VECTORS_PER_ITEM;
        int64_t row = item / groups, first = item % groups * VECTORS_PER_ITEM;
        int64_t last = first + VECTORS_PER_ITEM < args.vectors() ? first + VECTORS_PER_ITEM : args.vectors();
        const int64_t row_size = args.channels * args.states;
        for (int64_t v = first; v < last; ++v) {
            gather_states(args.A, &A2[(v - first) * padded], v, args, LOG2_E);
            gather_states(args.initial_state ? args.initial_state + row * row_size : nullptr,
                          &h[(v - first) * padded], v, args);
        }
        for (int64_t chunk = 0; chunk < args.chunks(); ++chunk) {
            shared.read(args, row, chunk);
            for (int64_t v = first; v < last; ++v)
                scan_chunk(row, chunk, v, &A2[(v - first) * padded], &h[(v - first) * padded]);
        }
        for (int64_t v = first; v < last; ++v)
            scatter_states(&h[(v - first) * padded], args.final_state + row * row_size, v, args);
    }

  private:
    void scan_chunk(int64_t row, int64_t chunk, int64_t vector, const Floats* A2, Floats* h) {
        const int64_t channel = vector * WIDTH, begin = chunk * CHUNK;
        const int lanes = args.lanes(vector), length = args.chunk_length(chunk);
        if (args.entries) std::memcpy(args.entry(row, vector, chunk), h, padded * sizeof(Floats));
        Floats bias = args.dt_bias ? load(args.dt_bias, FP32, channel, lanes) : Floats{};
        Floats D = args.D ? load(args.D, FP32, channel, lanes) : Floats{};
        for (int t = 0; t < length; ++t) {
            Floats u = args.u.at(row, begin + t, channel, lanes);
            Floats dt = softplus(args.dt.at(row, begin + t, channel, lanes) + bias, exp2);
            in.dt[t] = dt;
            in.dt_u[t] = dt * u;
            in.y[t] = D * u;
        }
        int64_t n = 0;
        for (; n + 16 <= padded; n += 16) advance<16>(length, shared, n, A2 + n, h + n, in, exp2);
        if (n < padded) advance<8>(length, shared, n, A2 + n, h + n, in, exp2);
        for (int t = 0; t < length; ++t) {
            Floats y = in.y[t];
            if (args.z.data) {
                Floats z = args.z.at(row, begin + t, channel, lanes);
                y *= z * sigmoid(z, exp2);
            }
            args.out.put(row, begin + t, channel, lanes, y);
        }
    }
};

}  // namespace

extern "C" EXPORT void selective_scan_forward(const ScanArguments* args) {
    int64_t groups = (args->vectors() + VECTORS_PER_ITEM - 1) / VECTORS_PER_ITEM;
    share(args->rows * groups, args->num_threads, [=] { return ForwardWorker(*args); });
}
