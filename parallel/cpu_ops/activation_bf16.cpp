// Activations of dense layers and routers: SwiGLU in bfloat16, twin of `TorchLayerOps.swiglu`, with a rounding to bfloat16
// where torch has one; and the sigmoid in float32. torch computes the last numbers of a tensor by another function than the
// others, so a row's results depend on the rows around it. Here they do not.
//
// Legend: T tokens, I width of an MLP.

#include "exponential.h"

using namespace waybill;

// gate_up [T, 2 I], rows `stride` apart, to out [T, I].
extern "C" void waybill_swiglu_bf16(const bf16* gate_up, bf16* out, int64_t T, int64_t I, int64_t stride, int num_threads) {
    // Below this, waking the threads takes longer than the work.
#pragma omp parallel for num_threads(num_threads) if (T * I > 65536)
    for (int64_t t = 0; t < T; ++t) {
        const bf16* gate = gate_up + t * stride;
        for (int64_t i = 0; i < I; i += WIDTH)
            store(out + t * I + i, rounded(silu(load(gate + i, I - i))) * load(gate + I + i, I - i), I - i);
    }
}

// Of `size` numbers.
extern "C" void waybill_sigmoid(const float* x, float* out, int64_t size) {
    for (int64_t i = 0; i < size; i += WIDTH) {
        float numbers[WIDTH] = {};
        const int64_t n = std::min<int64_t>(WIDTH, size - i);
        std::memcpy(numbers, x + i, n * sizeof(float));
        store(numbers, sigmoid(load(numbers)));
        std::memcpy(out + i, numbers, n * sizeof(float));
    }
}
