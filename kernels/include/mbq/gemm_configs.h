// Tile shapes of the gemm family: config ids, shared memory, scratch. Pure C++17, for host checks and kernels alike.
//
// A block computes 16 * n_tiles features of `rows` tokens. Each warp owns n_tiles / warps tiles of weights and all
// tokens of the block, so every weight is dequantized exactly once per block.
//
// Shared memory: two rings, then (over the same bytes) the block's outputs in fp32 or int32.
//   X ring   `depth` stages of `columns` columns: `panels` panels [rows, 128 bytes] each
//   W ring   `slots` tiles of 128 columns: codes [n_tiles, tile_bytes], scales [n_tiles, 4 groups, 8 rows, 2 halves]
//            in fp16, zeros [n_tiles, 4 groups, 8 bytes]; int8: one group and no zeros
#pragma once

#include <cstddef>
#include <cstdint>

#include "mbq/layout.h"
#include "mbq/mbq.h"

namespace mbq {

constexpr int kGemmFamily = 2;

// {id, family, n_tiles, warps, depth, rows, splits}. Ids are never reused: append only.
constexpr MbqConfig kGemmConfigs[] = {
    {101, kGemmFamily, 4, 4, 4, 16, 1},  {102, kGemmFamily, 4, 4, 4, 16, 2},  {103, kGemmFamily, 4, 4, 4, 16, 4},
    {104, kGemmFamily, 4, 4, 4, 16, 8},  {105, kGemmFamily, 4, 4, 4, 32, 1},  {106, kGemmFamily, 4, 4, 4, 32, 2},
    {107, kGemmFamily, 4, 4, 4, 32, 4},  {108, kGemmFamily, 4, 4, 4, 32, 8},  {109, kGemmFamily, 8, 4, 4, 64, 1},
    {110, kGemmFamily, 8, 4, 4, 64, 2},  {111, kGemmFamily, 8, 4, 4, 64, 4},  {112, kGemmFamily, 8, 4, 4, 128, 1},
    {113, kGemmFamily, 8, 4, 4, 128, 2}, {114, kGemmFamily, 8, 8, 4, 128, 1}, {115, kGemmFamily, 8, 8, 4, 128, 2},
    {116, kGemmFamily, 16, 8, 4, 128, 1}, {117, kGemmFamily, 8, 4, 4, 16, 1}, {118, kGemmFamily, 8, 4, 4, 16, 2},
    {119, kGemmFamily, 8, 4, 4, 16, 4},  {120, kGemmFamily, 8, 4, 4, 32, 1},  {121, kGemmFamily, 8, 4, 4, 32, 2},
    {122, kGemmFamily, 8, 4, 4, 32, 4},
};
constexpr int kGemmConfigCount = static_cast<int>(sizeof kGemmConfigs / sizeof *kGemmConfigs);

// Byte counts and lengths of one block's shared memory.
struct GemmShared {
    int columns;      // of X per stage
    int panels;       // of 128 bytes per row and stage
    int stage_bytes;  // of X
    int slots;        // of the W ring
    int tile_bytes;   // codes of one tile
    int scale_bytes;  // of one tile, room for its most groups
    int zero_bytes;
    int slot_bytes;   // codes, scales, zeros of all tiles of the block
    int output_pitch; // words between two tokens of the output tile; 4 mod 32, so that fragments meet no bank twice
    int output_bytes;
};

constexpr GemmShared gemm_shared(int n_tiles, int rows, int depth, uint32_t scheme) {
    const bool int8 = scheme == MBQ_W4A8;
    GemmShared s{};
    // A panel is 128 bytes of each row: 64 columns of 16 bits or 128 of int8. Few rows take whole tiles per stage,
    // because barriers would cost more than the space is worth.
    s.panels = !int8 && rows <= 32 ? 2 : 1;
    s.columns = (int8 ? 128 : 64) * s.panels;
    s.stage_bytes = rows * 128 * s.panels;
    // Tiles touched by `depth` stages in a row, wherever the first stage lies in its tile.
    const int stages_per_tile = 128 / s.columns;
    s.slots = (depth - 2 + stages_per_tile) / stages_per_tile + 1;
    s.tile_bytes = scheme == MBQ_W3A16 ? int{MBQ_W3T_TILE_BYTES} : int{MBQ_W4T_TILE_BYTES};
    s.scale_bytes = int8 ? 32 : 4 * 32;
    s.zero_bytes = int8 ? 0 : 4 * 8;
    s.slot_bytes = n_tiles * (s.tile_bytes + s.scale_bytes + s.zero_bytes);
    s.output_pitch = 16 * n_tiles + 4;
    s.output_bytes = 4 * rows * s.output_pitch;
    return s;
}

// Dynamic shared memory of one block.
constexpr size_t gemm_shared_bytes(const MbqConfig &config, uint32_t scheme) {
    const GemmShared s = gemm_shared(config.n_tiles, config.rows, config.depth, scheme);
    const int ring_bytes = config.depth * s.stage_bytes + s.slots * s.slot_bytes;
    return static_cast<size_t>(ring_bytes > s.output_bytes ? ring_bytes : s.output_bytes);
}

constexpr int gemm_block_columns(const MbqConfig &config, int n) {
    return (n + 16 * config.n_tiles - 1) / (16 * config.n_tiles);
}
constexpr int gemm_block_rows(const MbqConfig &config, int m) { return (m + config.rows - 1) / config.rows; }

// Tickets that must be zero before the launch: one per block of outputs, if K is split.
constexpr size_t gemm_tickets(const MbqConfig &config, int m, int n) {
    if (config.splits == 1) return 0;
    return static_cast<size_t>(gemm_block_columns(config, n)) * static_cast<size_t>(gemm_block_rows(config, m));
}

}  // namespace mbq
