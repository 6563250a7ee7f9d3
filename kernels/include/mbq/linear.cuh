// What one launch of a linear works on, and the last step of each output element.
#pragma once

#include "mbq/arch.cuh"
#include "mbq/layout.h"

namespace mbq {

// Arguments of the skinny and gemm kernels, by value. Sizes are logical unless their name says otherwise.
struct LinearParams {
    const uint8_t *codes;     // tiles [n_tiles, k_tiles], MBQ_W3T_TILE_BYTES or MBQ_W4T_TILE_BYTES each
    const uint8_t *scales;    // fp16 [n_tiles, groups, 8, 2], or fp32 [16 * n_tiles]
    const uint8_t *zeros;     // bytes [n_tiles, groups, 8]: low nibble row g, high nibble row g + 8
    const uint16_t *bias;     // [n] or null
    const uint16_t *residual; // [m, columns] or null
    const uint8_t *x;         // 16-bit [m, k]; int8 schemes: bytes [m, 128 * k_tiles] in order 0 2 1 3
    const float *x_scales;    // int8 schemes: [m]
    uint16_t *y;              // [m, columns]
    uint32_t *partials;       // fp32 or int32 [splits, m, 16 * n_tiles], if splits > 1
    uint32_t *tickets;        // one per block column, zero before the launch, if splits > 1
    int32_t m, n, k;
    int32_t n_tiles, k_tiles; // padded: 16 rows, 128 columns each
    int32_t groups;           // scales per row, padded columns included; 0 = per channel
    int32_t group_shift;      // log2 of the group size
    int32_t splits;
    int32_t columns;          // of y: n, or n / 2 with SILU_MUL
    uint32_t epilogue;
};

// x / (1 + exp(-x)) in fp32.
MBQ_FN float silu(float a) { return div_rn(a, add_rn(1.0f, exponential(-a))); }

// Round one output once and store it.
template <class T>
MBQ_FN void store_output(const LinearParams &p, int row, int column, float value) {
    const size_t at = static_cast<size_t>(row) * static_cast<size_t>(p.columns) + static_cast<size_t>(column);
    if (p.residual != nullptr) value = add_rn(value, T::to_float(load2(p.residual + at)));
    store<uint16_t>(p.y + at, T::from_float(value));
}

// Add the bias of a weight row; nothing where there is none.
template <class T>
MBQ_FN float with_bias(const LinearParams &p, int weight_row, float value) {
    return p.bias == nullptr ? value : add_rn(value, T::to_float(load2(p.bias + weight_row)));
}

}  // namespace mbq
