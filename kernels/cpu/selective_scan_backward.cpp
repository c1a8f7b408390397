#include "parallel.h"
#include "selective_scan_sums.h"

namespace {

// One chunk of VECTORS vectors of channels; the letters are those of kernels/README.md.
struct ChannelInputs {
    Floats u[VECTORS][CHUNK], dt[VECTORS][CHUNK], dt_u[VECTORS][CHUNK];
    Floats slope[VECTORS][CHUNK];  // of the softplus
    Floats gy[VECTORS][CHUNK];     // gradient of y = C h + D u
    Floats dz_over_y[VECTORS][CHUNK];
    Floats y[VECTORS][CHUNK], q1[VECTORS][CHUNK], q2[VECTORS][CHUNK];
};

// The states of a chunk, recomputed: h[t] is the state before position t, h[length] the last.
struct ChunkStates {
    Floats h[CHUNK + 1][STATES][VECTORS];
    Floats decay[CHUNK][STATES][VECTORS];
};

struct BackwardWorker {
    const ScanArguments& args;
    float* partial_BC;  // (B, groups, L, 2 * padded states): dB and dC of one group of channels
    float* partial_A;   // (B, vectors, padded states, WIDTH)
    float* partial_Db;  // (B, vectors, 2, WIDTH): dD and ddt_bias
    int64_t span;       // vectors in one item, a multiple of vectors_per_group
    SharedInputs shared;
    int64_t padded;
    Array<Floats> A2, adjoint, dA;     // [span][padded states]
    Array<Floats> D, bias, dD, dbias;  // [span]
    ChannelInputs in;
    ChunkStates states;
    Exp2 exp2;

    BackwardWorker(const ScanArguments& args, float* partial_BC, float* partial_A, float* partial_Db, int64_t span)
        : args(args),
          partial_BC(partial_BC),
          partial_A(partial_A),
          partial_Db(partial_Db),
          span(span),
          shared(args),
          padded(args.padded_states()),
          A2(allocate<Floats>(span * padded)),
          adjoint(allocate<Floats>(span * padded)),
          dA(allocate<Floats>(span * padded)),
          D(allocate<Floats>(span)),
          bias(allocate<Floats>(span)),
          dD(allocate<Floats>(span)),
          dbias(allocate<Floats>(span)) {}

    void operator()(int64_t item) {
        const int64_t spans = (args.vectors() + span - 1) / span, row = item / spans, first = item % spans * span;
        const int64_t count = args.vectors() - first < span ? args.vectors() - first : span;
        const int64_t groups = num_groups(args), per_group = vectors_per_group(args);
        for (int64_t v = 0; v < span; ++v)
            begin(row, first + v, v);
        for (int64_t chunk = args.chunks() - 1; chunk >= 0; --chunk) {
            shared.read(args, row, chunk);
            for (int64_t v = 0; v < count; v += VECTORS) {
                const int64_t group = (first + v) / per_group;
                float* dBC = partial_BC + ((row * groups + group) * args.length + chunk * CHUNK) * 2 * padded;
                if (v % per_group == 0) std::memset(dBC, 0, args.chunk_length(chunk) * 2 * padded * sizeof(float));
                go_back(row, chunk, first + v, v, dBC);
            }
        }
        for (int64_t v = 0; v < count; ++v)
            end(row, first + v, v);
    }

  private:
    // `vector` is one of the tensors', `v` the same one of the item's.
    void begin(int64_t row, int64_t vector, int64_t v) {
        const float* grad_state = args.grad_state ? args.grad_state + row * args.channels * args.states : nullptr;
        const int lanes = args.lanes(vector);
        gather_states(args.A, &A2[v * padded], vector, args, LOG2_E);
        gather_states(grad_state, &adjoint[v * padded], vector, args);
        for (int64_t n = 0; n < padded; ++n)
            dA[v * padded + n] = Floats{};
        D[v] = args.D ? load(args.D, FP32, vector * WIDTH, lanes) : Floats{};
        bias[v] = args.dt_bias ? load(args.dt_bias, FP32, vector * WIDTH, lanes) : Floats{};
        dD[v] = dbias[v] = Floats{};
    }

    void end(int64_t row, int64_t vector, int64_t v) {
        const int64_t index = row * args.vectors() + vector;
        std::memcpy(partial_A + index * padded * WIDTH, &dA[v * padded], padded * sizeof(Floats));
        store_floats(partial_Db + (2 * index) * WIDTH, dD[v]);
        store_floats(partial_Db + (2 * index + 1) * WIDTH, dbias[v]);
        if (args.dinitial)
            scatter_states(&adjoint[v * padded], args.dinitial + row * args.channels * args.states, vector, args);
    }

    void go_back(int64_t row, int64_t chunk, int64_t vector, int64_t first, float* dBC) {
        const int length = args.chunk_length(chunk);
        for (int v = 0; v < VECTORS; ++v)
            read_channels(row, chunk, vector + v, v, D[first + v], bias[first + v]);
        for (int64_t n = 0; n < padded; n += STATES) {
            for (int v = 0; v < VECTORS; ++v) {
                const bool exists = vector + v < args.vectors();
                const float* entry = exists ? args.entry(row, vector + v, chunk) + n * WIDTH : nullptr;
                recompute(length, n, v, &A2[(first + v) * padded + n], entry);
            }
            reverse(length, n, first, dBC);
        }
        for (int v = 0; v < VECTORS; ++v)
            write_channels(row, chunk, vector + v, v, first + v);
    }

    NOINLINE void read_channels(int64_t row, int64_t chunk, int64_t vector, int v, Floats D, Floats bias) {
        const int64_t channel = vector * WIDTH, begin = chunk * CHUNK;
        const int lanes = args.lanes(vector), length = args.chunk_length(chunk);
        const Column u = args.u.column(row, begin, channel, lanes), raw = args.dt.column(row, begin, channel, lanes);
        const Column grad = args.grad_out.column(row, begin, channel, lanes);
        const Column gate = args.z.column(row, begin, channel, lanes);
        const bool gated = args.z.data;
        for (int t = 0; t < length; ++t) {
            u.prefetch(t - CHUNK), raw.prefetch(t - CHUNK), grad.prefetch(t - CHUNK);
            gate.prefetch(t - CHUNK);
            const Softplus delta = softplus(raw[t] + bias, exp2);
            Floats x = u[t], g = grad[t];
            in.u[v][t] = x;
            in.dt[v][t] = delta.value;
            in.slope[v][t] = delta.slope;
            in.dt_u[v][t] = delta.value * x;
            in.y[v][t] = D * x;
            in.q1[v][t] = in.q2[v][t] = Floats{};
            if (gated) {
                Floats z = gate[t], s = sigmoid(z, exp2);
                in.dz_over_y[v][t] = g * s * (1.0f + z * (1.0f - s));
                g *= z * s;
            }
            in.gy[v][t] = g;
        }
    }

    NOINLINE void recompute(int length, int64_t first, int v, const Floats* A2, const float* entry) {
        Floats h[STATES], rate[STATES];
        for (int n = 0; n < STATES; ++n)
            h[n] = entry ? load_floats(entry + n * WIDTH) : Floats{}, rate[n] = A2[n];
        for (int n = 0; n < STATES; ++n)
            states.h[0][n][v] = h[n];
        for (int t = 0; t < length; ++t) {
            if (shared.starts[t])
                for (int n = 0; n < STATES; ++n)
                    h[n] = Floats{};
            const float* B = &shared.B[t * padded + first];
            const float* C = &shared.C[t * padded + first];
            Floats dt = in.dt[v][t], dt_u = in.dt_u[v][t], y = {};
#pragma GCC unroll 16
            for (int n = 0; n < STATES; ++n) {
                Floats decay = exp2(dt * rate[n]);
                h[n] = decay * h[n] + dt_u * B[n];
                states.decay[t][n][v] = decay;
                states.h[t + 1][n][v] = h[n];
                y += h[n] * C[n];
            }
            in.y[v][t] += y;
        }
    }

    // One position. Where a document starts, nothing reaches the state before it: left out, not multiplied by 0.
    template <bool STARTS>
    INLINE void step_back(int t, int64_t first, Floats (&d)[STATES][VECTORS], const Floats (&rate)[STATES][VECTORS],
                          Floats (&gA)[STATES][VECTORS], float* to) {
        const float* B = &shared.B[t * padded + first];
        const float* C = &shared.C[t * padded + first];
        Floats gy[VECTORS], dt[VECTORS], dt_u[VECTORS], q1[VECTORS] = {}, q2[VECTORS] = {}, dBC[2 * STATES];
        for (int v = 0; v < VECTORS; ++v)
            gy[v] = in.gy[v][t], dt[v] = in.dt[v][t], dt_u[v] = in.dt_u[v][t];
#pragma GCC unroll 16
        for (int n = 0; n < STATES; ++n) {
            Floats dB = {}, dC = {};
#pragma GCC unroll 16
            for (int v = 0; v < VECTORS; ++v) {
                d[n][v] += gy[v] * C[n];
                dC += gy[v] * states.h[t + 1][n][v];
                dB += d[n][v] * dt_u[v];
                q1[v] += d[n][v] * B[n];
                d[n][v] = STARTS ? Floats{} : d[n][v] * states.decay[t][n][v];
                if (STARTS) continue;
                Floats k = d[n][v] * states.h[t][n][v];
                gA[n][v] += k * dt[v];
                q2[v] += k * rate[n][v];
            }
            dBC[n] = dB, dBC[STATES + n] = dC;
        }
        for (int v = 0; v < VECTORS; ++v)
            in.q1[v][t] += q1[v], in.q2[v][t] += q2[v];
        for (int n = 0; n < 2 * STATES; n += 4)
            add_lane_sums(dBC + n, to + n);
    }

    NOINLINE void reverse(int length, int64_t first, int64_t vector, float* dBC) {
        Floats *A2 = &this->A2[vector * padded + first], *adjoint = &this->adjoint[vector * padded + first];
        Floats* dA = &this->dA[vector * padded + first];
        Floats d[STATES][VECTORS];
        for (int n = 0; n < STATES; ++n)
            for (int v = 0; v < VECTORS; ++v)
                d[n][v] = adjoint[v * padded + n];
        Floats rate[STATES][VECTORS],
            gA[STATES][VECTORS] = {};  // of this chunk: short sums lose less than one long one
        for (int n = 0; n < STATES; ++n)
            for (int v = 0; v < VECTORS; ++v)
                rate[n][v] = A2[v * padded + n];
        for (int t = length - 1; t >= 0; --t) {
            float* to = dBC + 2 * (t * padded + first);
            if (shared.starts[t])
                step_back<true>(t, first, d, rate, gA, to);
            else
                step_back<false>(t, first, d, rate, gA, to);
        }
        for (int n = 0; n < STATES; ++n)
            for (int v = 0; v < VECTORS; ++v)
                adjoint[v * padded + n] = d[n][v], dA[v * padded + n] += gA[n][v];
    }

    NOINLINE void write_channels(int64_t row, int64_t chunk, int64_t vector, int v, int64_t item_vector) {
        const Floats D = this->D[item_vector];
        const int64_t channel = vector * WIDTH, begin = chunk * CHUNK;
        const int lanes = args.lanes(vector), length = args.chunk_length(chunk);
        const Column du = args.du.column(row, begin, channel, lanes), ddt = args.ddt.column(row, begin, channel, lanes);
        const Column dz = args.dz.column(row, begin, channel, lanes);
        Floats gD = {}, gbias = {};  // of this chunk
        for (int t = 0; t < length; ++t) {
            Floats u = in.u[v][t], gy = in.gy[v][t], q1 = in.q1[v][t];
            Floats draw = (in.q2[v][t] * LN_2 + q1 * u) * in.slope[v][t];
            du.set(t, D * gy + q1 * in.dt[v][t]);
            ddt.set(t, draw);
            dz.set(t, in.dz_over_y[v][t] * in.y[v][t]);
            gD += gy * u;
            gbias += draw;
        }
        dD[item_vector] += gD;
        dbias[item_vector] += gbias;
    }
};

}  // namespace

extern "C" EXPORT void selective_scan_backward(const ScanArguments* arguments) {
    const ScanArguments& args = *arguments;
    const int64_t padded = args.padded_states();
    const int64_t threads = threads_worth(3 * args.state_updates(), args.num_threads);
    Array<float> partial_BC = allocate<float>(args.rows * num_groups(args) * args.length * 2 * padded);
    Array<float> partial_A = allocate<float>(args.rows * args.vectors() * padded * WIDTH);
    Array<float> partial_Db = allocate<float>(args.rows * args.vectors() * 2 * WIDTH);
    float *BC = partial_BC.get(), *A = partial_A.get(), *Db = partial_Db.get();
    const int64_t span = vectors_per_item(args, threads, vectors_per_group(args));
    share(args.rows * ((args.vectors() + span - 1) / span), threads,
          [=, &args] { return BackwardWorker(args, BC, A, Db, span); });
    share(args.rows * args.chunks(), threads, [=, &args] {
        return [=, &args](int64_t item) {
            const int64_t chunk = item % args.chunks(), begin = chunk * CHUNK;
            sum_groups(args, BC, item / args.chunks(), begin, begin + args.chunk_length(chunk));
        };
    });
    share(args.vectors(), threads,
          [=, &args] { return [=, &args](int64_t vector) { sum_rows(args, A, Db, vector); }; });
}
