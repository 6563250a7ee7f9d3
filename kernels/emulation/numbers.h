// Arithmetic of the device, bit for bit: every operation rounds once, to nearest even, subnormals included.
// A result that is not a number is the device's one quiet NaN.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace simt {

template <class To, class From>
To bit_cast(const From &value) {
    static_assert(sizeof(To) == sizeof(From), "sizes differ");
    To result;
    std::memcpy(&result, &value, sizeof(To));
    return result;
}

constexpr uint16_t kNan16 = 0x7FFF;
constexpr uint32_t kNan32 = 0x7FFFFFFF;

// Round to a 16-bit format with `kMantissa` stored bits; 15 - kMantissa bits of exponent.
template <int kMantissa>
uint16_t round_to_16(double value) {
    constexpr int kBias = (1 << (14 - kMantissa)) - 1;
    constexpr int kMinExponent = 1 - kBias;
    constexpr uint16_t kInfinity = static_cast<uint16_t>(((1 << (15 - kMantissa)) - 1) << kMantissa);
    if (value != value) return kNan16;
    const uint64_t bits = bit_cast<uint64_t>(value);
    const uint16_t sign = static_cast<uint16_t>(bits >> 63 << 15);
    const int exponent = static_cast<int>(bits >> 52 & 0x7FF) - 1023;
    if (exponent > kBias) return sign | kInfinity;
    const int place = exponent < kMinExponent ? kMinExponent : exponent;
    // In units of the last place; adding and subtracting 2^52 rounds to an integer.
    const double unit = bit_cast<double>(static_cast<uint64_t>(1023 + kMantissa - place) << 52);
    const double count = std::fabs(value) * unit + 0x1p52 - 0x1p52;
    const int code = ((place - kMinExponent) << kMantissa) + static_cast<int>(count);
    return static_cast<uint16_t>(sign | (code > kInfinity ? kInfinity : code));
}

// a + b in double, rounded to odd where it is inexact: rounding the result again to 16 bits then equals one rounding.
inline double sum_to_odd(double a, double b) {
    const double sum = a + b;
    if (!std::isfinite(sum)) return sum;
    const double b_part = sum - a;
    const double error = (a - (sum - b_part)) + (b - b_part);
    const uint64_t bits = bit_cast<uint64_t>(sum);
    if (error == 0.0 || (bits & 1) != 0) return sum;
    return bit_cast<double>((error > 0.0) == (sum > 0.0) ? bits + 1 : bits - 1);
}

inline float f16_to_float(uint32_t low_half) {
    const uint32_t magnitude = (low_half & 0x7FFFu) << 13, sign = (low_half & 0x8000u) << 16;
    if ((low_half & 0x7C00u) == 0x7C00u) return bit_cast<float>(sign | 0x7F800000u | (magnitude & 0x7FE000u));
    return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f));
}

inline float bf16_to_float(uint32_t low_half) { return bit_cast<float>(low_half << 16); }

inline uint16_t f16_from_float(float a) { return round_to_16<10>(a); }
inline uint16_t bf16_from_float(float a) { return round_to_16<7>(a); }

inline uint32_t pair(uint16_t low, uint16_t high) { return low | static_cast<uint32_t>(high) << 16; }

inline uint16_t f16_fma(uint32_t a, uint32_t b, uint32_t c) {
    const double product = static_cast<double>(f16_to_float(a)) * static_cast<double>(f16_to_float(b));  // exact
    return round_to_16<10>(sum_to_odd(product, f16_to_float(c)));
}

inline uint16_t bf16_fma(uint32_t a, uint32_t b, uint32_t c) {
    const double product = static_cast<double>(bf16_to_float(a)) * static_cast<double>(bf16_to_float(b));  // exact
    return round_to_16<7>(sum_to_odd(product, bf16_to_float(c)));
}

inline uint16_t f16_add(uint32_t a, uint32_t b) {
    return round_to_16<10>(static_cast<double>(f16_to_float(a)) + static_cast<double>(f16_to_float(b)));  // exact sum
}

inline uint16_t f16_mul(uint32_t a, uint32_t b) {
    return round_to_16<10>(static_cast<double>(f16_to_float(a)) * static_cast<double>(f16_to_float(b)));
}

inline uint32_t f16_add2(uint32_t a, uint32_t b) { return pair(f16_add(a, b), f16_add(a >> 16, b >> 16)); }
inline uint32_t f16_mul2(uint32_t a, uint32_t b) { return pair(f16_mul(a, b), f16_mul(a >> 16, b >> 16)); }
inline uint32_t f16_fma2(uint32_t a, uint32_t b, uint32_t c) {
    return pair(f16_fma(a, b, c), f16_fma(a >> 16, b >> 16, c >> 16));
}
inline uint32_t bf16_fma2(uint32_t a, uint32_t b, uint32_t c) {
    return pair(bf16_fma(a, b, c), bf16_fma(a >> 16, b >> 16, c >> 16));
}

inline float quiet(float a) { return a != a ? bit_cast<float>(kNan32) : a; }
inline float mul_rn(float a, float b) { return quiet(a * b); }
inline float add_rn(float a, float b) { return quiet(a + b); }
inline float div_rn(float a, float b) { return quiet(a / b); }
inline float fma_rn(float a, float b, float c) { return quiet(std::fma(a, b, c)); }
inline float exponential(float a) { return quiet(static_cast<float>(std::exp(static_cast<double>(a)))); }

// Half to even; saturates, and 0 for a NaN.
inline int32_t rint_to_int(float a) {
    if (a != a) return 0;
    if (a >= 0x1p31f) return std::numeric_limits<int32_t>::max();
    if (a < -0x1p31f) return std::numeric_limits<int32_t>::min();
    return static_cast<int32_t>(std::nearbyint(a));
}

}  // namespace simt
