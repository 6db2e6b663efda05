// What the logarithm of a sum of exponentials is made of: the largest number of each part of a row, and the sum of what the others
// are relative to it, in one order. torch's sum depends on the rows around.
//
// Legend: B rows, C columns, P parts of a row.

#include <limits>

#include "exponential.h"

using namespace waybill;

// x [B, C], rows x_row apart, to largest and sums [B, P]; parts have `width` columns, the last one what is left.
extern "C" void waybill_log_sum_exp(const float* x, float* largest, float* sums, int64_t B, int64_t C, int64_t P, int64_t width,
                                    int64_t x_row, int num_threads) {
#pragma omp parallel for collapse(2) num_threads(num_threads) if (B * C > 65536)
    for (int64_t b = 0; b < B; ++b)
        for (int64_t part = 0; part < P; ++part) {
            const Floats none = all(-std::numeric_limits<float>::infinity());
            const int64_t end = std::min(C, (part + 1) * width);
            const auto numbers = [&](int64_t c) {
                if (end - c >= WIDTH) return load(x + b * x_row + c);
                float some[WIDTH] = {};
                std::memcpy(some, x + b * x_row + c, (end - c) * sizeof(float));
                return only(0, end - c, load(some), none);
            };
            Floats most = none, sum = all(0.0f);
            for (int64_t c = part * width; c < end; c += WIDTH) most = larger(most, numbers(c));
            const float base = largest_of(most);
            // Nothing but minus infinity: there is no sum.
            if (base > -std::numeric_limits<float>::infinity())
                for (int64_t c = part * width; c < end; c += WIDTH) sum = sum + exponential(numbers(c) - all(base));
            largest[b * P + part] = base;
            sums[b * P + part] = sum_of(sum);
        }
}
