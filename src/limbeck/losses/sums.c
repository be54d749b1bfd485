/* Sums in float32 of numbers in half precision, of TYPE: see cpu.py. */

#include "numbers.h"

void add(float *total, const void *part, int64_t first, int64_t last) {
#pragma omp simd
    for (int64_t i = first; i < last; i++) total[i] += load(part, TYPE, i);
}

void times(void *product, const float *total, float factor, int64_t first, int64_t last) {
#pragma omp simd
    for (int64_t i = first; i < last; i++) store(product, TYPE, i, total[i] * factor);
}
