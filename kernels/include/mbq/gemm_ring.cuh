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
    int ticket; // which one counts the parts of K
    int first_row, first_tile;
    int begin, end;
};

// Shared address of chunk `chunk` (16 bytes) of a row in a panel. 16 bit: eight lanes read four neighbouring chunks of
// two rows at once; int8: sixteen lanes read two neighbouring chunks of four rows.
template <class Format>
MBQ_FN int swizzled(int row, int chunk) {
    return 128 * row + 16 * (Format::kInt8 ? chunk ^ (row & 3) << 1 : chunk ^ (row & 1) << 2);
}

// One thread's share of all copies. Addresses of copies that are not valid are never read and may lie anywhere.
template <class B>
class Ring {
public:
    MBQ_FN Ring(const LinearParams &params, const Place &place)
        : p(params), end(place.end), lane(lane_index()), tile(warp_index() * B::kWarpTiles), shared(shared_base()) {
        const int row = thread_index() / 8, chunk = thread_index() % 8;
        x_rows = p.m - place.first_row - row;
        x_column = (B::Format::kInt8 ? 16 : 8) * chunk;
        x = p.x + static_cast<size_t>(place.first_row + row) * row_bytes() + 16 * chunk;
        x_to = static_cast<uint32_t>(swizzled<typename B::Format>(row, chunk));
        w_first = static_cast<uint32_t>(place.first_tile + tile) * static_cast<uint32_t>(p.k_tiles);
    }

    // Begin the copies of one step: stage `phase` of a tile of columns, and the weights if it is the first of the tile.
    MBQ_FN void begin(int k_tile, int phase, int stage, int slot) const {
        if (k_tile >= end) return;
        copy_x(k_tile * B::kStagesPerTile + phase, stage_address(stage) + x_to);
        if (phase != 0) return;
        MBQ_UNROLL
        for (int i = 0; i < B::kWarpTiles; ++i) copy_tile(i, k_tile, slot_address(slot));
    }

    MBQ_FN uint32_t stage_address(int stage) const {
        return shared + static_cast<uint32_t>(stage * B::kShared.stage_bytes);
    }
    MBQ_FN uint32_t slot_address(int slot) const {
        return shared + static_cast<uint32_t>(B::kDepth * B::kShared.stage_bytes + slot * B::kShared.slot_bytes);
    }

private:
    MBQ_FN size_t row_bytes() const {
        return B::Format::kInt8 ? size_t{128} * static_cast<size_t>(p.k_tiles) : size_t{2} * static_cast<size_t>(p.k);
    }

    MBQ_FN void copy_x(int step, uint32_t to) const {
        constexpr int kPassRows = B::kThreads / 8;
        const size_t pass_bytes = kPassRows * row_bytes();
        MBQ_UNROLL
        for (int panel = 0; panel < B::kShared.panels; ++panel) {
            const uint8_t *from = x + static_cast<size_t>(128 * (step * B::kShared.panels + panel));
            // int8 rows are padded to whole tiles; 16-bit rows end at k.
            const bool inside = B::Format::kInt8 || MBQ_MUTANT == 8 ||
                                64 * (step * B::kShared.panels + panel) + x_column < p.k;
            MBQ_UNROLL
            for (int pass = 0; pass < B::kRows / kPassRows; ++pass) {
                const bool valid = inside && (MBQ_MUTANT == 7 || pass * kPassRows < x_rows);
                cp_async16(to + static_cast<uint32_t>(panel * B::kPanelBytes + pass * kPassRows * 128), from, valid);
                from += pass_bytes;
            }
        }
    }

    // Tile i of the warp's: codes, and scales and zero points of its groups. Lanes take chunks in order.
    MBQ_FN void copy_tile(int i, int k_tile, uint32_t slot) const {
        // 32 bits: a tile takes 768 bytes, so memory ends first.
        const uint32_t index = w_first + static_cast<uint32_t>(i * p.k_tiles + k_tile);
        const bool valid = index < static_cast<uint32_t>(p.n_tiles) * static_cast<uint32_t>(p.k_tiles);
        const uint8_t *from = p.codes + size_t{index} * B::kShared.tile_bytes + 16 * lane;
        const uint32_t to = slot + static_cast<uint32_t>((tile + i) * B::kShared.tile_bytes + 16 * lane);
        MBQ_UNROLL
        for (int byte = 0; byte < B::kShared.tile_bytes; byte += 512)
            if (byte + 16 * lane < B::kShared.tile_bytes)
                cp_async16(to + static_cast<uint32_t>(byte), from + byte, valid);
        if (p.groups == 0) return;
        const int groups = 128 >> p.group_shift;
        const size_t group = size_t{index} * static_cast<size_t>(groups);
        const int scales = B::kScalesAt + (tile + i) * B::kShared.scale_bytes + 16 * lane;
        if (lane < 2 * groups)
            cp_async16(slot + static_cast<uint32_t>(scales), p.scales + 32 * group + 16 * lane, valid);
        if constexpr (B::kShared.zero_bytes != 0) {
            const int zeros = B::kZerosAt + (tile + i) * B::kShared.zero_bytes + 8 * lane;
            if (lane < groups) cp_async8(slot + static_cast<uint32_t>(zeros), p.zeros + 8 * group + 8 * lane, valid);
        }
    }

    const LinearParams &p;
    const int end, lane;
    const int tile;         // the warp's first, within the block
    const uint32_t shared;
    int x_rows;             // how many there are from the thread's first on
    int x_column;           // within a panel
    uint32_t x_to;          // within a stage
    const uint8_t *x;       // the thread's first chunk
    uint32_t w_first;       // index of the warp's first tile at k_tile 0
};

}  // namespace gemm
}  // namespace mbq
