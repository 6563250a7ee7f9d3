// Tiles back to row-major 16-bit weights [n, k], each (u - z) * s rounded once.
//
// One warp per tile. A lane's eight columns of a block are neighbours in a row: one 16-byte store per row and block.
#pragma once

#include "mbq/linear.cuh"
#include "mbq/weights.cuh"

namespace mbq {

struct DequantRowsParams {
    LinearParams linear; // its weight fields only
    uint16_t *weights;   // [n, k]
};

namespace dequant_rows {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int64_t kMostBlocks = 1 << 20; // beyond that, warps take several tiles

// Where the lane's part of a tile is.
struct Place {
    int lane, g, t, n_tile, k_tile;
};

// Eight weights of rows g and g + 8 in one block of columns.
struct Octets {
    Words4 rows[2];
};

MBQ_FN void store_octets(const DequantRowsParams &p, const Place &at, int block, const Octets &octets) {
    const int column = 128 * at.k_tile + 32 * block + 8 * at.t;
    MBQ_UNROLL
    for (int half = 0; half < 2; ++half) {
        const int row = 16 * at.n_tile + 8 * half + at.g;
        if (row >= p.linear.n || column >= p.linear.k) continue;
        const size_t offset = static_cast<size_t>(row) * static_cast<size_t>(p.linear.k) + static_cast<size_t>(column);
        store<Words4>(p.weights + offset, octets.rows[half]);
    }
}

// w3a16 and w4a16.
template <class Words, class T>
struct Float {
    static MBQ_FN void tile(const DequantRowsParams &p, const Place &at, const uint8_t *codes) {
        const LinearParams &l = p.linear;
        const typename Words::Lane lane = Words::stream(Words::cursor(codes, at.lane), 0);
        MBQ_UNROLL
        for (int b = 0; b < 4; ++b) {
            const size_t group = static_cast<size_t>((128 * at.k_tile + 32 * b) >> l.group_shift);
            const size_t place = (static_cast<size_t>(at.n_tile) * static_cast<size_t>(l.groups) + group) * 8u +
                                 static_cast<size_t>(at.g);
            const auto pair = RowPair<Words, T>::of(load4(l.scales + 4 * place), load1(l.zeros + place));
            uint32_t d[8];
            pair.block(lane, b / 2, b % 2, d);
            store_octets(p, at, b, {{{d[0], d[2], d[4], d[6]}, {d[1], d[3], d[5], d[7]}}});
        }
    }
};

// w4a8: int8 fragments hold 16 * q, four columns in byte order 0 2 1 3.
template <class T>
struct Int8 {
    // The format's scale of row g (half 0) or g + 8; per channel the 1/16 is in it already.
    static MBQ_FN float scale(const LinearParams &l, const Place &at, int half) {
        const size_t tile = static_cast<size_t>(at.n_tile);
        if (l.groups == 0) return float_of_bits(load4(l.scales + 4 * (16 * tile + 8 * half + at.g)));
        const size_t group = static_cast<size_t>(128 * at.k_tile >> l.group_shift);
        const size_t place = (tile * static_cast<size_t>(l.groups) + group) * 8u + static_cast<size_t>(at.g);
        return mul_rn(F16::to_float(load2(l.scales + 4 * place + 2 * half)), 1.0f / 16.0f);
    }
    static MBQ_FN uint32_t weight(uint32_t word, int byte, float scale) {
        const int32_t code16 = static_cast<int32_t>(word << (24 - 8 * byte)) >> 24;
        return T::from_float(mul_rn(to_float(code16), scale));
    }
    static MBQ_FN void tile(const DequantRowsParams &p, const Place &at, const uint8_t *codes) {
        const W4::Lane lane = W4::stream(W4::cursor(codes, at.lane), 0);
        const float scales[2] = {scale(p.linear, at, 0), scale(p.linear, at, 1)};
        MBQ_UNROLL
        for (int b = 0; b < 4; ++b) {
            uint32_t a[4];
            int8_fragments(lane, b, a);
            Octets octets{};
            MBQ_UNROLL
            for (int half = 0; half < 2; ++half) {
                const float s = scales[half];
                const uint32_t first = a[half], second = a[2 + half];
                octets.rows[half] = {weight(first, 0, s) | weight(first, 2, s) << 16,
                                     weight(first, 1, s) | weight(first, 3, s) << 16,
                                     weight(second, 0, s) | weight(second, 2, s) << 16,
                                     weight(second, 1, s) | weight(second, 3, s) << 16};
            }
            store_octets(p, at, b, octets);
        }
    }
};

}  // namespace dequant_rows

template <class Rows, int tile_bytes>
MBQ_KERNEL MBQ_BOUNDS(dequant_rows::kThreads, 4) dequant_rows_kernel(const DequantRowsParams p) {
    using namespace dequant_rows;
    const int64_t tiles = static_cast<int64_t>(p.linear.n_tiles) * p.linear.k_tiles;
    const int64_t stride = static_cast<int64_t>(kWarps) * grid_x();
    for (int64_t i = static_cast<int64_t>(kWarps) * block_x() + warp_index(); i < tiles; i += stride) {
        const int lane = lane_index();
        const Place at{lane, lane >> 2, lane & 3, static_cast<int>(i / p.linear.k_tiles),
                       static_cast<int>(i % p.linear.k_tiles)};
        Rows::tile(p, at, p.linear.codes + i * tile_bytes);
    }
}

template <class Rows, int tile_bytes>
MBQ_HOST_FN int dequantize_rows(const DequantRowsParams &p, CUstream_st *stream) {
    using namespace dequant_rows;
    const int64_t needed = (static_cast<int64_t>(p.linear.n_tiles) * p.linear.k_tiles + kWarps - 1) / kWarps;
    const int blocks = static_cast<int>(needed < kMostBlocks ? needed : kMostBlocks);
    return launch(dequant_rows_kernel<Rows, tile_bytes>, Grid{blocks, 1, 1}, kThreads, 0, stream, p);
}

}  // namespace mbq
