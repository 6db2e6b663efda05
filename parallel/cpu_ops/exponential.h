// The exponential function of the numbers of a vector, and what is made of it.

#pragma once

#include "vectors.h"

namespace waybill {

// exp(x) = 2^n * 2^f with |f| <= 1/2, the latter by its Taylor polynomial: relative error below 2e-6. Beyond the range of
// float32 it is 0 or infinity; NaN stays.
inline Floats exponential(Floats x) {
    const Floats within = smaller(all(89.0f), larger(all(-104.0f), x)), to_base_2 = all(1.44269504f);
    const Floats n = nearest_whole(within * to_base_2), f = multiply_add(within, to_base_2, all(0.0f) - n);
    Floats power = all(1.5403530e-4f);
    for (float c : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f})
        power = multiply_add(power, f, all(c));
    return scaled_by_power(power, n);
}

inline Floats sigmoid(Floats x) { return all(1.0f) / (all(1.0f) + exponential(all(0.0f) - x)); }
inline Floats silu(Floats x) { return x / (all(1.0f) + exponential(all(0.0f) - x)); }

}  // namespace waybill
