// The exponential function of 16 numbers.

#pragma once

#include <immintrin.h>

namespace waybill {

// exp(x) = 2^n * 2^f with |f| <= 1/2, the latter by its Taylor polynomial: relative error below 2e-7.
inline __m512 exponential(__m512 x) {
    const __m512 scaled = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f));
    const __m512 n = _mm512_roundscale_ps(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(scaled, n);
    __m512 power = _mm512_set1_ps(1.5403530e-4f);
    for (float c : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f})
        power = _mm512_fmadd_ps(power, f, _mm512_set1_ps(c));
    return _mm512_scalef_ps(power, n);
}

}  // namespace waybill
