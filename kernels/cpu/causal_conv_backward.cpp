#include "causal_conv.h"
#include "parallel.h"

namespace {

template <int TAPS>
struct BackwardWorker {
    static constexpr int KEPT = 8;  // positions whose gp is kept, a power of 2 of at least GROUP + TAPS - 1
    const ConvArguments& args;
    float* partial;  // (B, blocks, TAPS + 1, D): the gradients of weight and bias from one block
    Taps taps;
    Exp2 exp2;
    alignas(64) float gp[KEPT][TILE];        // gradient before SiLU, of position t in row t % KEPT
    alignas(64) float sums[TAPS + 1][TILE];  // the gradients of weight and bias

    BackwardWorker(const ConvArguments& args, float* partial) : args(args), partial(partial) {}

    void operator()(int64_t index) {
        const Item item(args, index);
        taps.read(args, item.first, item.size);
        std::memset(sums, 0, sizeof sums);
        std::memset(gp, 0, sizeof gp);
        // The inputs of the block and, for the first one, the window before it; each is done when gp has come as far as
        // TAPS - 1 positions behind it, which may lie in the next block.
        int64_t input = item.block == 0 ? 1 - TAPS : item.begin;
        for (int64_t t = item.begin; input < item.end;) {
            if (t + GROUP <= item.end && args.sees_all(item.row, t, GROUP)) {
                differentiate_group(item, t);
                t += GROUP;
            } else {
                if (t < args.length) differentiate(item, t, 0, t < item.end);
                ++t;
            }
            while (input < item.end && input + TAPS <= t)
                write_input(item, input++);
        }
        float* to = partial + (item.row * args.blocks() + item.block) * (TAPS + 1) * args.channels + item.first;
        for (int k = 0; k <= TAPS; ++k)
            std::memcpy(to + k * args.channels, sums[k], item.size * sizeof(float));
    }

  private:
    INLINE Floats through_silu(Floats grad, Floats p) const {
        Floats s = sigmoid(p, exp2);
        return grad * (s * (1.0f + p * (1.0f - s)));
    }

    // Channels from the `begin`-th of the item on; the sums count the item's own positions alone.
    void differentiate(const Item& item, int64_t t, int64_t begin, bool counts) {
        Slice inputs[TAPS], grad = slice(args.grad_out, item.row, t, item.first);
        find_inputs<TAPS>(args, item.row, t, item.first, inputs);
        for (int64_t c = begin; c < item.size; c += WIDTH) {
            const int count = item.size - c < WIDTH ? int(item.size - c) : WIDTH;
            Floats p = load_floats(taps.bias + c), x[TAPS];
            for (int k = 0; k < TAPS; ++k) {
                x[k] = inputs[k].at(c, count);
                p += x[k] * load_floats(taps.weight[k] + c);
            }
            Floats g = through_silu(grad.at(c, count), p);
            store_floats(gp[t % KEPT] + c, g);
            if (!counts) continue;
            for (int k = 0; k < TAPS; ++k)
                store_floats(sums[k] + c, load_floats(sums[k] + c) + g * x[k]);
            store_floats(sums[TAPS] + c, load_floats(sums[TAPS] + c) + g);
        }
    }

    void differentiate_group(const Item& item, int64_t t) {
        const Slice x = slice(args.x, item.row, t - TAPS + 1, item.first);
        const int64_t full = item.size / WIDTH * WIDTH;
        if (x.dtype == FP32)
            differentiate_group(item, t, static_cast<const float*>(x.data), full);
        else
            differentiate_group(item, t, static_cast<const Half*>(x.data), full);
        for (int i = 0; full < item.size && i < GROUP; ++i)
            differentiate(item, t + i, full, true);
    }

    template <class Element>
    NOINLINE void differentiate_group(const Item& item, int64_t t, const Element* x, int64_t size) {
        Slice grad[GROUP];
        for (int i = 0; i < GROUP; ++i)
            grad[i] = slice(args.grad_out, item.row, t + i, item.first);
        const int64_t step = args.x.time_stride;
        for (int64_t c = 0; c < size; c += WIDTH) {
            Floats seen[GROUP + TAPS - 1], g[GROUP];
            for (int i = 0; i < GROUP + TAPS - 1; ++i)
                seen[i] = load_full(x + i * step + c);
            for (int i = 0; i < GROUP; ++i) {
                Floats p = load_floats(taps.bias + c);
                for (int k = 0; k < TAPS; ++k)
                    p += seen[i + TAPS - 1 - k] * load_floats(taps.weight[k] + c);
                g[i] = through_silu(grad[i].at(c, WIDTH), p);
                store_floats(gp[(t + i) % KEPT] + c, g[i]);
            }
            for (int k = 0; k <= TAPS; ++k) {
                Floats sum = load_floats(sums[k] + c);
                for (int i = 0; i < GROUP; ++i)
                    sum += k < TAPS ? g[i] * seen[i + TAPS - 1 - k] : g[i];
                store_floats(sums[k] + c, sum);
            }
        }
    }

    // The gradient of input s, from the positions s + k that see it and from the window that is handed on.
    void write_input(const Item& item, int64_t s) {
        const View& view = s < 0 ? args.dinitial : args.dx;
        if (!view.data) return;
        Slice to = slice(view, item.row, s < 0 ? TAPS - 1 + s : s, item.first), window = {nullptr, FP32};
        const int64_t ahead = args.length - s;  // the window holds inputs 1 .. TAPS - 1 before position `length`
        if (ahead < TAPS && ahead < args.reach(item.row, args.length))
            window = slice(args.grad_window, item.row, TAPS - 1 - ahead, item.first);
        const float* seen_by[TAPS];
        bool all = !window.data;
        for (int k = 0; k < TAPS; ++k) {
            const bool sees = s + k >= 0 && s + k < args.length && k < args.reach(item.row, s + k);
            seen_by[k] = sees ? gp[(s + k) % KEPT] : nullptr;
            all = all && sees;
        }
        const int64_t full = all ? item.size / WIDTH * WIDTH : 0;
        if (full && to.dtype == FP32)
            add_taps(seen_by, static_cast<float*>(to.data), full);
        else if (full)
            add_taps(seen_by, static_cast<Half*>(to.data), full);
        for (int64_t c = full; c < item.size; c += WIDTH) {
            const int count = item.size - c < WIDTH ? int(item.size - c) : WIDTH;
            Floats g = window.at(c, count);
            for (int k = TAPS - 1; k >= 0; --k)  // from the last to the first, as when the row is cut in two
                if (seen_by[k]) g += load_floats(seen_by[k] + c) * load_floats(taps.weight[k] + c);
            to.put(c, count, g);
        }
    }

    template <class Element>
    INLINE void add_taps(const float* const (&seen_by)[TAPS], Element* to, int64_t size) {
        for (int64_t c = 0; c < size; c += WIDTH) {
            Floats g = {};
            for (int k = TAPS - 1; k >= 0; --k)
                g += load_floats(seen_by[k] + c) * load_floats(taps.weight[k] + c);
            store_full(to + c, g);
        }
    }
};

// The blocks' sums of one vector of channels, in their order.
void sum_blocks(const ConvArguments& args, const float* partial, int64_t channel) {
    const int count = args.channels - channel < WIDTH ? int(args.channels - channel) : WIDTH;
    for (int64_t k = 0; k <= args.taps; ++k) {
        Floats sum = {};
        for (int64_t i = 0; i < args.rows * args.blocks(); ++i)
            sum += load(partial, FP32, (i * (args.taps + 1) + k) * args.channels + channel, count);
        if (k == args.taps) {
            if (args.dbias) store(args.dbias, FP32, channel, count, sum);
        } else {
            for (int lane = 0; lane < count; ++lane)
                args.dweight[(channel + lane) * args.taps + args.taps - 1 - k] = sum[lane];
        }
    }
}

template <int TAPS>
void backward(const ConvArguments& args) {
    Array<float> partial = allocate<float>(args.rows * args.blocks() * (TAPS + 1) * args.channels);
    float* sums = partial.get();
    const int64_t threads = threads_worth(args.rows * args.length * args.channels * 8, args.num_threads);
    share(args.rows * args.blocks() * args.tiles(), threads, [=, &args] { return BackwardWorker<TAPS>(args, sums); });
    share((args.channels + WIDTH - 1) / WIDTH, threads,
          [=, &args] { return [=, &args](int64_t vector) { sum_blocks(args, sums, vector * WIDTH); }; });
}

}  // namespace

// `taps` is 1 .. MAX_TAPS: the caller has checked.
extern "C" EXPORT void causal_conv_backward(const ConvArguments* args) {
    switch (args->taps) {
        case 1:
            return backward<1>(*args);
        case 2:
            return backward<2>(*args);
        case 3:
            return backward<3>(*args);
        default:
            return backward<4>(*args);
    }
}
