// Activations to int8, one scale per token.
//
//   sx = max(max|x|, 1e-5) / 127      xq = rint(x / sx)      both with IEEE division, all in fp32
//
// Every four columns are stored in byte order 0 2 1 3, the order of a tile's nibbles; columns k .. 128 * k_tiles are 0.
// A token that holds a NaN or an infinity has that for its scale, and xq = 0: 0 * sx makes its whole output row NaN,
// and no other.
#pragma once

#include "mbq/arch.cuh"

#ifndef MBQ_MUTANT
#define MBQ_MUTANT 0
#endif

namespace mbq {

struct QuantActParams {
    const uint16_t *x; // [m, k]
    uint8_t *xq;       // [m, 128 * k_tiles]
    float *sx;         // [m]
    int32_t m, k, k_tiles;
};

namespace act_quant {

constexpr int kMaxThreads = 1024;
constexpr float kSmallest = 1e-5f;
constexpr float kLevels = 127.0f;
constexpr uint32_t kInfinity = 0x7F800000u;

MBQ_FN uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

// Bits of the largest magnitude of a pair of 16-bit floats: without their sign they order like integers, NaN on top.
MBQ_FN uint32_t magnitude(uint32_t pair) { return larger(pair & 0x7FFFu, (pair >> 16) & 0x7FFFu); }

// The largest value of all threads, in every thread. Shared memory: one word per warp.
MBQ_FN uint32_t block_max(uint32_t value) {
    for (int mask = 16; mask > 0; mask /= 2) value = larger(value, shuffle_xor(value, mask));
    const uint32_t shared = shared_base();
    if (lane_index() == 0) sts4(shared + 4u * static_cast<uint32_t>(warp_index()), value);
    block_barrier();
    for (int warp = 0; warp < block_threads() / 32; ++warp)
        value = larger(value, lds4(shared + 4u * static_cast<uint32_t>(warp)));
    return value;
}

MBQ_FN uint32_t quantized_byte(float x, float sx) { return static_cast<uint32_t>(rint_to_int(div_rn(x, sx))) & 0xFFu; }

// Four columns, given as two pairs, to four bytes.
template <class T>
MBQ_FN uint32_t quantized_word(uint32_t first, uint32_t second, float sx) {
    const uint32_t c0 = quantized_byte(T::to_float(first & 0xFFFFu), sx);
    const uint32_t c1 = quantized_byte(T::to_float(first >> 16), sx);
    const uint32_t c2 = quantized_byte(T::to_float(second & 0xFFFFu), sx);
    const uint32_t c3 = quantized_byte(T::to_float(second >> 16), sx);
#if MBQ_MUTANT == 13
    return c0 | c1 << 8 | c2 << 16 | c3 << 24;
#else
    return c0 | c2 << 8 | c1 << 16 | c3 << 24;
#endif
}

}  // namespace act_quant

// Grid: one block per token. A thread takes eight columns at a time; the second reading of them comes from the cache.
template <class T>
MBQ_KERNEL MBQ_BOUNDS(act_quant::kMaxThreads, 1) quant_act_kernel(const QuantActParams p) {
    using namespace act_quant;
    const size_t row = static_cast<size_t>(block_x());
    const uint16_t *x = p.x + row * static_cast<size_t>(p.k);
    uint8_t *xq = p.xq + row * 128u * static_cast<size_t>(p.k_tiles);

    uint32_t top = 0;
    for (int column = 8 * thread_index(); column < p.k; column += 8 * block_threads()) {
        const Words4 v = load16(x + column);
        top = larger(top, larger(larger(magnitude(v.x), magnitude(v.y)), larger(magnitude(v.z), magnitude(v.w))));
    }
    const float absmax = T::to_float(block_max(top));
    const bool finite = bits_of_float(absmax) < kInfinity;
    const float sx = div_rn(absmax < kSmallest ? kSmallest : absmax, kLevels); // in this order a NaN passes
    if (thread_index() == 0) store<float>(p.sx + row, sx);

    for (int column = 8 * thread_index(); column < 128 * p.k_tiles; column += 8 * block_threads()) {
        Words2 bytes{0, 0};
        if (finite && column < p.k) {
            const Words4 v = load16(x + column);
            bytes = {quantized_word<T>(v.x, v.y, sx), quantized_word<T>(v.z, v.w, sx)};
        }
        store<Words2>(xq + column, bytes);
    }
}

template <class T>
MBQ_HOST_FN int quant_act(const QuantActParams &p, CUstream_st *stream) {
    const int warps = (p.k_tiles * 16 + 31) / 32; // one pass over the columns, if a block has so many threads
    const int threads = 32 * warps < act_quant::kMaxThreads ? 32 * warps : act_quant::kMaxThreads;
    return launch(quant_act_kernel<T>, Grid{p.m, 1, 1}, threads, static_cast<size_t>(4 * threads / 32), stream, p);
}

}  // namespace mbq
