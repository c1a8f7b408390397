#include "causal_conv.h"
#include "parallel.h"

namespace {

template <int TAPS>
struct ForwardWorker {
    const ConvArguments& args;
    Taps taps;
    Exp2 exp2;

    explicit ForwardWorker(const ConvArguments& args) : args(args) {}

    void operator()(int64_t index) {
        const Item item(args, index);
        taps.read(args, item.first, item.size);
        for (int64_t t = item.begin; t < item.end;) {
            if (t + GROUP <= item.end && args.sees_all(item.row, t, GROUP)) {
                convolve_group(item, t);
                t += GROUP;
            } else {
                convolve(item, t++, 0);
            }
        }
        if (item.end == args.length) write_window(item);
    }

  private:
    // Channels from the `begin`-th of the item on.
    void convolve(const Item& item, int64_t t, int64_t begin) {
        Slice inputs[TAPS], out = slice(args.out, item.row, t, item.first);
        find_inputs<TAPS>(args, item.row, t, item.first, inputs);
        for (int64_t c = begin; c < item.size; c += WIDTH) {
            const int count = item.size - c < WIDTH ? int(item.size - c) : WIDTH;
            Floats p = load_floats(taps.bias + c);
            for (int k = 0; k < TAPS; ++k)
                p += inputs[k].at(c, count) * load_floats(taps.weight[k] + c);
            out.put(c, count, p * sigmoid(p, exp2));
        }
    }

    void convolve_group(const Item& item, int64_t t) {
        const Slice x = slice(args.x, item.row, t - TAPS + 1, item.first);
        const Slice out = slice(args.out, item.row, t, item.first);
        const int64_t full = item.size / WIDTH * WIDTH;
        if (x.dtype == FP32)
            convolve_group(static_cast<const float*>(x.data), static_cast<float*>(out.data), full);
        else
            convolve_group(static_cast<const Half*>(x.data), static_cast<Half*>(out.data), full);
        for (int i = 0; full < item.size && i < GROUP; ++i)
            convolve(item, t + i, full);
    }

    // GROUP positions that see nothing but the sequence: each input is read once for all of them.
    template <class Element>
    NOINLINE void convolve_group(const Element* x, Element* out, int64_t size) {
        const int64_t step = args.x.time_stride, out_step = args.out.time_stride;
        for (int64_t c = 0; c < size; c += WIDTH) {
            Floats seen[GROUP + TAPS - 1];
            for (int i = 0; i < GROUP + TAPS - 1; ++i)
                seen[i] = load_full(x + i * step + c);
            for (int i = 0; i < GROUP; ++i) {
                Floats p = load_floats(taps.bias + c);
                for (int k = 0; k < TAPS; ++k)
                    p += seen[i + TAPS - 1 - k] * load_floats(taps.weight[k] + c);
                store_full(out + i * out_step + c, p * sigmoid(p, exp2));
            }
        }
    }

    void write_window(const Item& item) {
        Slice inputs[TAPS];
        find_inputs<TAPS>(args, item.row, args.length, item.first, inputs);  // inputs[k] is position length - k
        for (int k = 1; k < TAPS; ++k) {
            Slice to = slice(args.final_window, item.row, TAPS - 1 - k, item.first);
            for (int64_t c = 0; c < item.size; c += WIDTH) {
                const int count = item.size - c < WIDTH ? int(item.size - c) : WIDTH;
                to.put(c, count, inputs[k].at(c, count));
            }
        }
    }
};

template <int TAPS>
void forward(const ConvArguments& args) {
    const int64_t threads = threads_worth(args.rows * args.length * args.channels * 4, args.num_threads);
    share(args.rows * args.blocks() * args.tiles(), threads, [&] { return ForwardWorker<TAPS>(args); });
}

}  // namespace

// `taps` is 1 .. MAX_TAPS: the caller has checked.
extern "C" EXPORT void causal_conv_forward(const ConvArguments* args) {
    switch (args->taps) {
        case 1:
            return forward<1>(*args);
        case 2:
            return forward<2>(*args);
        case 3:
            return forward<3>(*args);
        default:
            return forward<4>(*args);
    }
}
