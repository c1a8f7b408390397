// Runs one operator of kernels/cpu on tensors from standard input, forward and backward, and writes its results to
// standard output: for processors that Python and torch do not run on here, under emulation. One thread, as no parallel
// region is handed over. All tensors are contiguous; what has a length is of the given dtype, the rest fp32.
#include <cstdio>
#include <deque>
#include <vector>

#include "causal_conv.h"
#include "selective_scan.h"
#include "ssd.h"

extern "C" {
void selective_scan_forward(const ScanArguments*);
void selective_scan_backward(const ScanArguments*);
void causal_conv_forward(const ConvArguments*);
void causal_conv_backward(const ConvArguments*);
void ssd_forward(const SSDArguments*);
void ssd_backward(const SSDArguments*);
}

namespace {

std::deque<std::vector<char>> memory;
Dtype dtype;

int64_t read_number() {
    int64_t number = 0;
    if (std::fread(&number, 8, 1, stdin) != 1) std::abort();
    return number;
}

char* allocate_bytes(int64_t bytes) {
    memory.emplace_back(bytes + 64, char(0xff));  // NaN until it is written
    return memory.back().data();
}

template <class T = float>
T* read(int64_t count) {
    char* data = allocate_bytes(count * sizeof(T));
    if (std::fread(data, sizeof(T), count, stdin) != size_t(count)) std::abort();
    return reinterpret_cast<T*>(data);
}

float* floats(int64_t count) { return reinterpret_cast<float*>(allocate_bytes(count * 4)); }
void write(const void* data, int64_t bytes) { std::fwrite(data, 1, bytes, stdout); }
void write(const float* data, int64_t count) { write(static_cast<const void*>(data), 4 * count); }

// (rows, length, size) of the given dtype
struct Series {
    View view;
    int64_t bytes;

    Series(int64_t rows, int64_t length, int64_t size, bool from_input) {
        bytes = rows * length * size * (dtype == FP32 ? 4 : 2);
        view = {from_input ? read<char>(bytes) : allocate_bytes(bytes), dtype, length * size, size};
    }
    HeadView heads(int64_t size) const { return {view, size}; }
    void write_out() const { write(view.data, bytes); }
};

void run_selective_scan(int64_t R, int64_t L, int64_t E, int64_t N) {
    ScanArguments args = {R, L, E, N, 1};
    Series u(R, L, E, true), dt(R, L, E, true), z(R, L, E, true), B(R, L, N, true), C(R, L, N, true);
    Series out(R, L, E, false), du(R, L, E, false), ddt(R, L, E, false), dz(R, L, E, false);
    Series dB(R, L, N, false), dC(R, L, N, false);
    args.u = u.view, args.dt = dt.view, args.z = z.view, args.B = B.view, args.C = C.view;
    args.A = read(E * N), args.D = read(E), args.dt_bias = read(E), args.initial_state = read(R * E * N);
    args.boundaries = read<uint8_t>(R * L);
    args.grad_out = Series(R, L, E, true).view, args.grad_state = read(R * E * N);
    args.entries = floats(R * args.vectors() * args.chunks() * args.padded_states() * WIDTH);
    args.out = out.view, args.final_state = floats(R * E * N);
    args.du = du.view, args.ddt = ddt.view, args.dz = dz.view, args.dB = dB.view, args.dC = dC.view;
    args.dA = floats(E * N), args.dD = floats(E), args.dbias = floats(E), args.dinitial = floats(R * E * N);
    selective_scan_forward(&args);
    selective_scan_backward(&args);
    out.write_out(), write(args.final_state, R * E * N);
    for (const Series* series : {&du, &ddt, &dz, &dB, &dC})
        series->write_out();
    write(args.dA, E * N), write(args.dD, E), write(args.dbias, E), write(args.dinitial, R * E * N);
}

void run_ssd(int64_t R, int64_t L, int64_t H, int64_t G, int64_t P, int64_t N) {
    SSDArguments args = {R, L, H, G, P, N, 1};
    Series x(R, L, H * P, true), B(R, L, G * N, true), C(R, L, G * N, true), dt(R, L, H, true);
    Series out(R, L, H * P, false), dx(R, L, H * P, false), dB(R, L, G * N, false), dC(R, L, G * N, false);
    Series ddt(R, L, H, false);
    args.x = x.heads(P), args.B = B.heads(N), args.C = C.heads(N), args.dt = dt.view;
    args.A = read(H), args.D = read(H), args.dt_bias = read(H), args.initial_state = read(R * H * P * N);
    args.boundaries = read<uint8_t>(R * L);
    args.grad_out = Series(R, L, H * P, true).heads(P), args.grad_state = read(R * H * P * N);
    args.entries = floats(R * H * args.chunks() * P * N);
    args.out = out.heads(P), args.final_state = floats(R * H * P * N);
    args.dx = dx.heads(P), args.dB = dB.heads(N), args.dC = dC.heads(N), args.ddt = ddt.view;
    args.dA = floats(H), args.dD = floats(H), args.dbias = floats(H), args.dinitial = floats(R * H * P * N);
    ssd_forward(&args);
    ssd_backward(&args);
    out.write_out(), write(args.final_state, R * H * P * N);
    for (const Series* series : {&dx, &ddt, &dB, &dC})
        series->write_out();
    write(args.dA, H), write(args.dD, H), write(args.dbias, H), write(args.dinitial, R * H * P * N);
}

void run_causal_conv(int64_t R, int64_t L, int64_t D, int64_t W) {
    ConvArguments args = {R, L, D, W, 1};
    const int64_t carried = (W - 1) * D;
    const auto window = [=](float* data) { return View{data, FP32, carried, D}; };
    Series x(R, L, D, true), out(R, L, D, false), dx(R, L, D, false);
    args.x = x.view, args.weight = read(D * W), args.bias = read(D);
    args.initial_window = window(read(R * carried)), args.boundaries = read<uint8_t>(R * L);
    args.grad_out = Series(R, L, D, true).view, args.grad_window = window(read(R * carried));
    args.out = out.view, args.final_window = window(floats(R * carried));
    args.dx = dx.view, args.dinitial = window(floats(R * carried));
    args.dweight = floats(D * W), args.dbias = floats(D);
    causal_conv_forward(&args);
    causal_conv_backward(&args);
    out.write_out(), write(static_cast<float*>(args.final_window.data), R * carried), dx.write_out();
    write(args.dweight, D * W), write(args.dbias, D), write(static_cast<float*>(args.dinitial.data), R * carried);
}

}  // namespace

// Standard input: the operator's number, the dtype's, the sizes, then the tensors.
int main() {
    const int64_t which = read_number();
    dtype = Dtype(read_number());
    int64_t sizes[6];
    for (int64_t& size : sizes)
        size = read_number();
    if (which == 0) run_selective_scan(sizes[0], sizes[1], sizes[2], sizes[3]);
    if (which == 1) run_ssd(sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]);
    if (which == 2) run_causal_conv(sizes[0], sizes[1], sizes[2], sizes[3]);
}
