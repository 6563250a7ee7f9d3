// Weights as 16-bit numbers: (u - z) * s, rounded once.
//
// fp16: u - z is an exact integer below 16 and s is fp16, so one fp16 product is one rounding.
// bf16: s is fp16 with 11 bits, more than bf16 holds. Cut it into s1 + s2, 8 bits and 3 bits: (u - z) * s2 has at most
//       7 bits and is exact in bf16, so the fused (u - z) * s1 + (u - z) * s2 rounds the exact product once.
#pragma once

#include "mbq/dequant.cuh"

#ifndef MBQ_MUTANT
#define MBQ_MUTANT 0
#endif

namespace mbq {

// One row's scale, ready to multiply pairs of integers.
template <class T>
struct RowScale;

template <>
struct RowScale<F16> {
    uint32_t s;

    static MBQ_FN RowScale of(uint32_t half) { return {twice(half)}; }
    MBQ_FN uint32_t times(uint32_t integers) const { return F16::mul2(integers, s); }
};

template <>
struct RowScale<BF16> {
    uint32_t s1, s2;

    static MBQ_FN RowScale of(uint32_t half) {
        const float s = F16::to_float(half);
        const uint32_t cut = bits_of_float(s) & 0xFFFF0000u;
        const uint32_t rest = bits_of_float(add_rn(s, float_of_bits(cut ^ 0x80000000u)));
        return {cut | cut >> 16, rest | rest >> 16}; // the low half of `rest` is 0: three bits
    }
    MBQ_FN uint32_t times(uint32_t integers) const { return BF16::fma2(integers, s1, BF16::mul2(integers, s2)); }
};

// What the lane's two rows, g and g + 8, multiply and subtract in one group of columns.
template <class Words, class T>
struct RowPair {
    using Zero = typename Dequant<Words, T>::Zero;
    Zero zero[2];
    RowScale<T> scale[2];

    // scales: the two fp16 scales of the pair; zeros: row g in the low nibble, row g + 8 in the high one.
    static MBQ_FN RowPair of(uint32_t scales, uint32_t zeros) {
#if MBQ_MUTANT == 11
        zeros = (zeros << 4 | zeros >> 4) & 0xFFu;
#endif
        return {{Dequant<Words, T>::zero(zeros & 15u), Dequant<Words, T>::zero(zeros >> 4)},
                {RowScale<T>::of(scales & 0xFFFFu), RowScale<T>::of(scales >> 16)}};
    }

    // Weights of one 32-column block of half a tile, as operand A of its two steps: d[4 * step + register].
    MBQ_FN void block(const typename Words::Lane &codes, int half_tile, int block, uint32_t (&d)[8]) const {
        uint32_t integers[16];
        Dequant<Words, T>::fragments(codes, half_tile, zero[0], zero[1], integers);
        MBQ_UNROLL
        for (int i = 0; i < 8; ++i) d[i] = scale[i % 2].times(integers[8 * block + i]);
    }
};

}  // namespace mbq
