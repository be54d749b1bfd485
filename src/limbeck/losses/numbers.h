/* Numbers of three types, read and written as float. HALF is defined where float16 is one of them,
   since not every compiler knows it. */

#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

typedef enum { float32, bfloat16, float16 } Type;

INLINE float as_float(int32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE int32_t as_bits(float value) {
    int32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE float load(const void *from, Type type, int64_t i) {
    if (type == bfloat16) return as_float((int32_t)((uint32_t)((const uint16_t *)from)[i] << 16));
#ifdef HALF
    if (type == float16) return (float)((const _Float16 *)from)[i];
#endif
    return ((const float *)from)[i];
}

INLINE void store(void *to, Type type, int64_t i, float value) {
    if (type == bfloat16) { /* to the nearest, and to even between two */
        uint32_t bits = (uint32_t)as_bits(value);
        ((uint16_t *)to)[i] = (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
        return;
    }
#ifdef HALF
    if (type == float16) {
        ((_Float16 *)to)[i] = (_Float16)value;
        return;
    }
#endif
    ((float *)to)[i] = value;
}

/* a b + c, rounded once where the processor can. Elsewhere nothing is contracted to it: x y - x y
   would not be 0 then. */
INLINE float times_plus(float a, float b, float c) {
#if defined(__FMA__) || defined(__FP_FAST_FMAF) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

INLINE int64_t bytes_of(Type type) { return type == float32 ? 4 : 2; }
