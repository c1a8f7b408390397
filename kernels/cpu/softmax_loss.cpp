// Softmax cross-entropy of rows of logits, in place: one read and one write of what is too large for any cache.

#include "memory.h"
#include "parallel.h"

namespace {

// Mirrored by ctypes in mambatrain/ops/native/softmax_loss.py: the same fields in the same order.
struct SoftmaxLossArguments {
    int64_t rows, columns, num_threads;
    void* logits;  // (R, V) contiguous; replaced by their gradients where those are wanted
    Dtype dtype;
    const int64_t* targets;  // (R,), each below V
    float* losses;           // (R,)
    int64_t wants_gradient;
};

// A row of logits stays in the second level of the cache for its three passes.
template <class T>
struct RowWorker {
    const SoftmaxLossArguments& args;
    Exp2 exp2;

    void operator()(int64_t row) {
        T* logits = static_cast<T*>(args.logits) + row * args.columns;
        const int64_t target = args.targets[row];
        const float top = largest(logits), of_target = value(logits, target);
        const double sum = sum_of_exponentials(logits, top);
        // NaN where a logit is NaN or +inf
        args.losses[row] = float(__builtin_log(sum) + (double(top) - double(of_target)));
        if (!args.wants_gradient) return;
        write_probabilities(logits, top, float(1.0 / sum));
        // not from the stored probability, which may have been rounded
        const float p = exp2.exp(broadcast(of_target - top))[0] * float(1.0 / sum);
        store(logits, args.dtype, target, 1, broadcast(p - 1.0f));
    }

  private:
    static constexpr int STEP = 4;  // vectors at once: as many sums that do not wait for each other

    float value(const T* logits, int64_t i) const { return load(logits, args.dtype, i, 1)[0]; }

    NOINLINE float largest(const T* logits) const {
        Floats top[STEP];
        for (int j = 0; j < STEP; ++j)
            top[j] = broadcast(-__builtin_inff());
        int64_t i = 0;
        for (; i + STEP * WIDTH <= args.columns; i += STEP * WIDTH)
            for (int j = 0; j < STEP; ++j)
                top[j] = larger(load_full(logits + i + j * WIDTH), top[j]);
        float result = -__builtin_inff();
        for (int j = 0; j < STEP; ++j)
            for (int lane = 0; lane < WIDTH; ++lane)
                result = top[j][lane] > result ? top[j][lane] : result;
        for (; i < args.columns; ++i) {
            const float x = value(logits, i);
            result = x > result ? x : result;
        }
        return result;
    }

    NOINLINE double sum_of_exponentials(const T* logits, float top) const {
        Floats sums[STEP] = {};
        int64_t i = 0;
        for (; i + STEP * WIDTH <= args.columns; i += STEP * WIDTH)
            for (int j = 0; j < STEP; ++j)
                sums[j] += exp2.exp(load_full(logits + i + j * WIDTH) - top);
        double sum = 0.0;
        for (int j = 0; j < STEP; ++j)
            for (int lane = 0; lane < WIDTH; ++lane)
                sum += sums[j][lane];
        for (; i < args.columns; ++i)
            sum += exp2.exp(broadcast(value(logits, i) - top))[0];
        return sum;
    }

    NOINLINE void write_probabilities(T* logits, float top, float scale) const {
        int64_t i = 0;
        for (; i + WIDTH <= args.columns; i += WIDTH)
            store_full(logits + i, exp2.exp(load_full(logits + i) - top) * scale);
        if (i < args.columns) {
            const int left = int(args.columns - i);
            store(logits, args.dtype, i, left, exp2.exp(load(logits, args.dtype, i, left) - top) * scale);
        }
    }
};

}  // namespace

extern "C" EXPORT void softmax_loss(const SoftmaxLossArguments* args) {
    const int64_t threads = threads_worth(args->rows * args->columns, args->num_threads);
    if (args->dtype == FP32)
        share(args->rows, threads, [=] { return RowWorker<float>{*args, Exp2()}; });
    else
        share(args->rows, threads, [=] { return RowWorker<Half>{*args, Exp2()}; });
}
