// y = x W^T for many tokens: weights are operand A of the MMA, activations operand B.
//
//   block    16 * n_tiles features x `rows` tokens, a part of K; warps side by side along the features
//   loop     wait for a stage, barrier, begin the copies of the stage `depth` - 1 ahead, multiply
//   end      sums to shared memory; with several parts of K the last block adds them; bias, epilogue, one rounding
//
// Order of additions: K ascends inside a part, parts in index order. Nothing depends on which block runs when.
#pragma once

#include "mbq/gemm_formats.cuh"
#include "mbq/gemm_outputs.cuh"
#include "mbq/gemm_ring.cuh"

namespace mbq {
namespace gemm {

// Blocks that run at the same time should share X and W in the second-level cache: they are numbered within stripes of
// kStripe blocks of rows, rows first.
constexpr int kStripe = 8;

template <class B>
MBQ_FN Place place_of(const LinearParams &p) {
    const int tile_blocks = (p.n_tiles + B::kTiles - 1) / B::kTiles, row_blocks = (p.m + B::kRows - 1) / B::kRows;
    const int stripe = block_x() / (kStripe * tile_blocks), within = block_x() % (kStripe * tile_blocks);
    const int left = row_blocks - stripe * kStripe, height = left < kStripe ? left : kStripe;
    Place at{};
    at.row_block = stripe * kStripe + within % height;
    at.tile_block = within / height;
    at.first_row = at.row_block * B::kRows;
    at.first_tile = at.tile_block * B::kTiles;
    at.begin = static_cast<int>(static_cast<int64_t>(p.k_tiles) * block_y() / p.splits);
    at.end = static_cast<int>(static_cast<int64_t>(p.k_tiles) * (block_y() + 1) / p.splits);
    return at;
}

MBQ_FN int next_of(int index, int count) { return index + 1 == count ? 0 : index + 1; }

// All of this block's part of K. Stage: where the current step of X lies; slot: its tile of weights. A step's copies
// are begun kAhead steps before it is multiplied, into the stage that the step before the current one has left.
template <class B>
MBQ_FN void multiply_part(const LinearParams &p, const Place &at,
                          typename B::Format::Sum (&sum)[B::kWarpTiles][B::kRowTiles][4]) {
    using Format = typename B::Format;
    constexpr int kAhead = B::kDepth - 1, kPerTile = B::kStagesPerTile;
#if MBQ_MUTANT == 3
    constexpr int kPending = kAhead;
#else
    constexpr int kPending = kAhead - 1;
#endif
    const Ring<B> ring(p, at);
    int ahead_stage = 0, ahead_slot = 0;
    const auto begin = [&](int step, int phase) {
        ring.begin(step, phase == 0, ahead_stage, ahead_slot);
        cp_async_commit();
        ahead_stage = next_of(ahead_stage, B::kDepth);
        if (phase == kPerTile - 1) ahead_slot = next_of(ahead_slot, B::kShared.slots);
    };
    MBQ_UNROLL
    for (int i = 0; i < kAhead; ++i) begin(at.begin * kPerTile + i, i % kPerTile);

    int stage = 0, slot = 0;
    for (int tile = at.begin; tile < at.end; ++tile) {
        typename Format::Codes codes[B::kWarpTiles];
        MBQ_UNROLL
        for (int phase = 0; phase < kPerTile; ++phase) {
#if MBQ_MUTANT == 6
            begin(tile * kPerTile + phase + kAhead, (phase + kAhead) % kPerTile);
            cp_async_wait<kPending + 1>();
            block_barrier();
#else
#if MBQ_MUTANT != 2
            cp_async_wait<kPending>();
#endif
            block_barrier(); // all copies of this stage are there, and every warp has left the stage before
            begin(tile * kPerTile + phase + kAhead, (phase + kAhead) % kPerTile);
#endif
            if (phase == 0) {
                MBQ_UNROLL
                for (int i = 0; i < B::kWarpTiles; ++i) {
                    const int mine = warp_index() * B::kWarpTiles + i;
                    codes[i] = Format::codes(ring.slot_address(slot) + static_cast<uint32_t>(mine * B::kShared.tile_bytes));
                }
            }
            Format::template multiply<B>(p, ring.stage_address(stage), ring.slot_address(slot), phase, codes, sum);
            stage = next_of(stage, B::kDepth);
        }
        slot = next_of(slot, B::kShared.slots);
    }
    cp_async_wait<0>();
}

}  // namespace gemm

// Grid: x = blocks of rows times blocks of tiles, y = parts of K.
template <class B, int kBlocksPerSm>
MBQ_KERNEL MBQ_BOUNDS(B::kThreads, kBlocksPerSm) gemm_kernel(const LinearParams p) {
    const gemm::Place at = gemm::place_of<B>(p);
    typename B::Format::Sum sum[B::kWarpTiles][B::kRowTiles][4] = {};
    gemm::multiply_part<B>(p, at, sum);
    block_barrier(); // the rings become the output tile
    const gemm::Outputs<B> outputs(p, at);
    outputs.put(sum);
#if MBQ_MUTANT != 1
    block_barrier();
#endif
    if (p.splits == 1 || outputs.last_of_parts()) outputs.store_all();
}

template <class B, int kBlocksPerSm>
MBQ_HOST_FN int launch_gemm_block(const LinearParams &p, const MbqConfig &config, CUstream_st *stream) {
    const Grid grid{gemm_block_columns(config, p.n) * gemm_block_rows(config, p.m), p.splits, 1};
    return launch(gemm_kernel<B, kBlocksPerSm>, grid, B::kThreads, gemm_shared_bytes(config, B::Format::kScheme), stream, p);
}

// Launch the instance of a config; MBQ_E_CONFIG if there is none.
template <class Format>
MBQ_HOST_FN int launch_gemm(const LinearParams &p, const MbqConfig &config, CUstream_st *stream) {
    using gemm::Block;
    const auto is = [&](int n_tiles, int warps, int rows) {
        return config.n_tiles == n_tiles && config.warps == warps && config.depth == 4 && config.rows == rows;
    };
    if (is(4, 4, 16)) return launch_gemm_block<Block<Format, 4, 4, 4, 16>, 4>(p, config, stream);
    if (is(4, 4, 32)) return launch_gemm_block<Block<Format, 4, 4, 4, 32>, 4>(p, config, stream);
    if (is(8, 4, 64)) return launch_gemm_block<Block<Format, 8, 4, 4, 64>, 3>(p, config, stream);
    if (is(8, 4, 128)) return launch_gemm_block<Block<Format, 8, 4, 4, 128>, 2>(p, config, stream);
    if (is(8, 8, 128)) return launch_gemm_block<Block<Format, 8, 8, 4, 128>, 2>(p, config, stream);
    if (is(16, 8, 128)) return launch_gemm_block<Block<Format, 16, 8, 4, 128>, 1>(p, config, stream);
    return MBQ_E_CONFIG;
}

}  // namespace mbq
