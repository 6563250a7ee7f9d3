// Block shapes of the skinny family: config ids and limits. Pure C++17, for host checks and kernels alike.
#pragma once

#include <cstddef>
#include <cstdint>

#include "mbq/layout.h"
#include "mbq/mbq.h"

namespace mbq {

constexpr int kSkinnyFamily = 1;
constexpr int kSkinnyRows = 8; // tokens: the columns of one MMA

constexpr int kSkinnyShapes[][2] = {{1, 2}, {2, 1}, {2, 2}}; // tiles per warp, tiles on their way
constexpr int kSkinnyWarps[] = {4, 7, 8, 14, 16};            // 7: 3584 columns are 28 tiles
constexpr int kSkinnySplits[] = {1, 2, 4};
constexpr int kSkinnyCount = 3 * 5 * 3;

// Ids 1 .. 45; they never change their meaning.
constexpr MbqConfig skinny_config(int index) {
    const int split = index % 3, warps = index / 3 % 5, shape = index / 15;
    return {index + 1, kSkinnyFamily, kSkinnyShapes[shape][0], kSkinnyWarps[warps], kSkinnyShapes[shape][1],
            kSkinnyRows, kSkinnySplits[split]};
}

constexpr int skinny_id(int n_tiles, int depth, int warps, int splits) {
    for (int i = 0; i < kSkinnyCount; ++i) {
        const MbqConfig c = skinny_config(i);
        if (c.n_tiles == n_tiles && c.depth == depth && c.warps == warps && c.splits == splits) return c.id;
    }
    return MBQ_E_CONFIG;
}

// 16 warps leave 128 registers a thread: enough for one tile with one group, too few for more.
constexpr int most_skinny_warps(int n_tiles, int groups_per_tile) { return n_tiles == 1 && groups_per_tile <= 1 ? 16 : 8; }

// Warps x M x rows sums; the flag of the last block to arrive takes the word after them.
constexpr size_t skinny_shared_bytes(int warps, int m, int n_tiles) {
    return 4 * (static_cast<size_t>(warps) * static_cast<size_t>(m * n_tiles * MBQ_TILE_ROWS) + 1);
}

}  // namespace mbq
