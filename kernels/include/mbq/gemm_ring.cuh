// The gemm's copies from global to shared memory: a ring of X stages and a ring of weight tiles.
//
// Rows of X are cut into panels of 128 bytes, chunks of 16 bytes permuted by the row so that the fragment loads of
// gemm_formats.cuh meet no bank twice. Weight tiles keep their order: it is the fragments' order already. A warp
// copies the tiles it will multiply itself; all warps copy X together.
#pragma once

#include "mbq/gemm_configs.h"
#include "mbq/linear.cuh"

#ifndef MBQ_MUTANT
#define MBQ_MUTANT 0
#endif

namespace mbq {
namespace gemm {

// A kernel instance: the shape of a block, and what follows from it.
template <class Format_, int kTiles_, int kWarps_, int kDepth_, int kRows_>
struct Block {
    using Format = Format_;
    static constexpr int kTiles = kTiles_, kWarps = kWarps_, kDepth = kDepth_, kRows = kRows_;
    static constexpr int kThreads = 32 * kWarps;
    static constexpr int kWarpTiles = kTiles / kWarps;
    static constexpr int kRowTiles = kRows / 8; // MMA operands B of eight tokens
    static constexpr GemmShared kShared = gemm_shared(kTiles, kRows, kDepth, Format::kScheme);
    static constexpr int kStagesPerTile = 128 / kShared.columns;
    static constexpr int kPanelBytes = kRows * 128;
    static constexpr int kScalesAt = kTiles * kShared.tile_bytes; // within a slot
    static constexpr int kZerosAt = kScalesAt + kTiles * kShared.scale_bytes;
    static_assert(kTiles % kWarps == 0 && kRows % (kThreads / 8) == 0 && 16 * kTiles <= kThreads, "");
};

// What a block computes: rows first_row .. of X, tiles first_tile .. of W, columns of tiles begin .. end.
struct Place {
    int row_block, tile_block; // counted in blocks
    int first_row, first_tile;
    int begin, end;
};

// Shared address of chunk `chunk` (16 bytes) of a row in a panel. 16 bit: eight lanes read four neighbouring chunks of
// two rows at once; int8: sixteen lanes read two neighbouring chunks of four rows.
template <class Format>
MBQ_FN int swizzled(int row, int chunk) {
    return 128 * row + 16 * (Format::kInt8 ? chunk ^ (row & 3) << 1 : chunk ^ (row & 1) << 2);
}

// One thread's share of all copies.
template <class B>
class Ring {
public:
    MBQ_FN Ring(const LinearParams &params, const Place &place)
        : p(params), at(place), lane(lane_index()), shared(shared_base()) {
        const int row = thread_index() / 8, chunk = thread_index() % 8;
        my_row = place.first_row + row;
        row_bytes = B::Format::kInt8 ? size_t{128} * static_cast<size_t>(p.k_tiles) : size_t{2} * static_cast<size_t>(p.k);
        x = p.x + static_cast<size_t>(my_row) * row_bytes + 16 * chunk;
        column = (B::Format::kInt8 ? 16 : 8) * chunk;
        x_shared = shared + static_cast<uint32_t>(swizzled<typename B::Format>(row, chunk));
        my_tile = place.first_tile + warp_index() * B::kWarpTiles;
        w_shared = shared + static_cast<uint32_t>(B::kDepth * B::kShared.stage_bytes);
        groups_shift = 7 - p.group_shift;
    }

    // Begin the copies of one step of X, and of its tile of weights if the step is the first of the tile.
    MBQ_FN void begin(int step, bool first_of_tile, int stage, int slot) const {
        if (step >= at.end * B::kStagesPerTile) return;
        copy_x(step, x_shared + static_cast<uint32_t>(stage * B::kShared.stage_bytes));
        if (first_of_tile) copy_weights(step / B::kStagesPerTile, slot_address(slot));
    }

    MBQ_FN uint32_t stage_address(int stage) const {
        return shared + static_cast<uint32_t>(stage * B::kShared.stage_bytes);
    }
    MBQ_FN uint32_t slot_address(int slot) const {
        return w_shared + static_cast<uint32_t>(slot * B::kShared.slot_bytes);
    }

private:
    MBQ_FN void copy_x(int step, uint32_t to) const {
        constexpr int kPassRows = B::kThreads / 8;
        const size_t stage_bytes = static_cast<size_t>(128 * B::kShared.panels);
        MBQ_UNROLL
        for (int panel = 0; panel < B::kShared.panels; ++panel) {
            const uint8_t *from = x + static_cast<size_t>(step) * stage_bytes + 128 * panel;
            // int8 rows are padded to whole tiles; 16-bit rows end at k.
#if MBQ_MUTANT == 8
            const bool inside = true;
#else
            const bool inside = B::Format::kInt8 || step * B::kShared.columns + 64 * panel + column < p.k;
#endif
            MBQ_UNROLL
            for (int pass = 0; pass < B::kRows / kPassRows; ++pass) {
#if MBQ_MUTANT == 7
                const bool valid = inside;
#else
                const bool valid = inside && my_row + pass * kPassRows < p.m;
#endif
                cp_async16(to + static_cast<uint32_t>(panel * B::kPanelBytes + pass * kPassRows * 128),
                           valid ? from + static_cast<size_t>(pass * kPassRows) * row_bytes : p.x, valid);
            }
        }
    }

    MBQ_FN void copy_weights(int k_tile, uint32_t slot) const {
        constexpr int kTileChunks = B::kShared.tile_bytes / 16, kChunks = B::kWarpTiles * kTileChunks;
        const int first = warp_index() * B::kWarpTiles;
        MBQ_UNROLL
        for (int i = 0; i < (kChunks + 31) / 32; ++i) {
            const int chunk = lane + 32 * i, tile = chunk / kTileChunks, offset = 16 * (chunk % kTileChunks);
            if (chunk >= kChunks) break;
            const bool valid = my_tile + tile < p.n_tiles;
            const size_t from = tile_index(tile, k_tile, p.k_tiles) * static_cast<size_t>(B::kShared.tile_bytes);
            cp_async16(slot + static_cast<uint32_t>((first + tile) * B::kShared.tile_bytes + offset),
                       valid ? p.codes + from + offset : p.codes, valid);
        }
        if (p.groups != 0) copy_groups(k_tile, slot);
    }

    // Scales and zero points of the tile's groups. Up to 16 lanes take a chunk of scales each, as many one group of zeros.
    MBQ_FN void copy_groups(int k_tile, uint32_t slot) const {
        const int first = warp_index() * B::kWarpTiles, group = k_tile << groups_shift;
        const int tile = lane >> (groups_shift + 1), chunk = lane & ((2 << groups_shift) - 1);
        if (tile < B::kWarpTiles) {
            const bool valid = my_tile + tile < p.n_tiles;
            const size_t from = tile_index(tile, group, p.groups) * 32u + static_cast<size_t>(16 * chunk);
            cp_async16(slot + static_cast<uint32_t>(B::kScalesAt + (first + tile) * B::kShared.scale_bytes + 16 * chunk),
                       valid ? p.scales + from : p.scales, valid);
        }
        if constexpr (B::kShared.zero_bytes != 0) {
            const int zero_tile = lane >> groups_shift, zero_group = lane & ((1 << groups_shift) - 1);
            if (zero_tile < B::kWarpTiles) {
                const bool valid = my_tile + zero_tile < p.n_tiles;
                const size_t from = tile_index(zero_tile, group + zero_group, p.groups) * 8u;
                cp_async8(slot + static_cast<uint32_t>(B::kZerosAt + (first + zero_tile) * B::kShared.zero_bytes +
                                                       8 * zero_group),
                          valid ? p.zeros + from : p.zeros, valid);
            }
        }
    }

    // Place of one of the warp's tiles in an array [n_tiles, width].
    MBQ_FN size_t tile_index(int tile, int column_index, int width) const {
        return static_cast<size_t>(my_tile + tile) * static_cast<size_t>(width) + static_cast<size_t>(column_index);
    }

    const LinearParams &p;
    const Place &at;
    const int lane;
    const uint32_t shared;
    int my_row, my_tile, column, groups_shift;
    size_t row_bytes;
    const uint8_t *x;
    uint32_t x_shared, w_shared;
};

}  // namespace gemm
}  // namespace mbq
