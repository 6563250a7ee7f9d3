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

// The kernel's argument: how many blocks there are is worked out once, on the host.
struct Params {
    LinearParams linear;
    int32_t row_blocks, tile_blocks;
};

template <class B>
MBQ_FN Place place_of(const Params &params, int block) {
    const LinearParams &p = params.linear;
    const int stripe = block / (kStripe * params.tile_blocks), within = block % (kStripe * params.tile_blocks);
    const int left = params.row_blocks - stripe * kStripe, height = left < kStripe ? left : kStripe;
    Place at{};
    at.ticket = block;
    at.first_row = (stripe * kStripe + within % height) * B::kRows;
    at.first_tile = within / height * B::kTiles;
    at.begin = p.k_tiles * block_y() / p.splits;
    at.end = p.k_tiles * (block_y() + 1) / p.splits;
    return at;
}

MBQ_FN int next_of(int index, int count) { return index + 1 == count ? 0 : index + 1; }
MBQ_FN int previous_of(int index, int count) { return index == 0 ? count - 1 : index - 1; }

// All of this block's part of K. Stage: where the current step of X lies; slot: its tile of weights. Copies begin
// kAhead steps before they are multiplied. Both rings are just so long that they go where the step before the current
// one, and the tile before the current one, have been.
template <class B>
MBQ_FN void multiply_part(const LinearParams &p, const Place &at,
                          typename B::Format::Sum (&sum)[B::kWarpTiles][B::kRowTiles][4]) {
    constexpr int kAhead = B::kDepth - 1, kPerTile = B::kStagesPerTile, kSlots = B::kShared.slots;
    static_assert((kAhead + kPerTile - 1) / kPerTile == kSlots - 1, "");
    constexpr int kPending = MBQ_MUTANT == 3 ? kAhead : kAhead - 1;
    const Ring<B> ring(p, at);
    MBQ_UNROLL
    for (int i = 0; i < kAhead; ++i) {
        ring.begin(at.begin + i / kPerTile, i % kPerTile, i, i / kPerTile);
        cp_async_commit();
    }
    int stage = 0, slot = 0;
    for (int tile = at.begin; tile < at.end; ++tile) {
        MBQ_UNROLL
        for (int phase = 0; phase < kPerTile; ++phase) {
            if (MBQ_MUTANT != 2) cp_async_wait<kPending>();
            // All threads' copies of this step are there, and every warp has left the step before.
            if (MBQ_MUTANT != 6) block_barrier();
            ring.begin(tile + (phase + kAhead) / kPerTile, (phase + kAhead) % kPerTile, previous_of(stage, B::kDepth),
                       previous_of(slot, kSlots));
            cp_async_commit();
            if (MBQ_MUTANT == 6) block_barrier();
            B::Format::template multiply<B>(p, ring.stage_address(stage), ring.slot_address(slot), phase, sum);
            stage = next_of(stage, B::kDepth);
        }
        slot = next_of(slot, kSlots);
    }
    cp_async_wait<0>();
}

}  // namespace gemm

// Grid: x = blocks of rows times blocks of tiles, y = parts of K.
template <class B, int kBlocksPerSm>
MBQ_KERNEL MBQ_BOUNDS(B::kThreads, kBlocksPerSm) gemm_kernel(const gemm::Params params) {
    const LinearParams &p = params.linear;
    typename B::Format::Sum sum[B::kWarpTiles][B::kRowTiles][4] = {};
    gemm::multiply_part<B>(p, gemm::place_of<B>(params, block_x()), sum);
    block_barrier(); // the rings become the output tile
    const gemm::Place at = gemm::place_of<B>(params, block_x_again());
    const gemm::Outputs<B> outputs(p, at);
    outputs.put(sum);
#if MBQ_MUTANT != 1
    block_barrier();
#endif
    if (p.splits == 1 || outputs.last_of_parts()) outputs.store_all();
}

template <class B, int kBlocksPerSm>
MBQ_HOST_FN int launch_gemm_block(const LinearParams &p, const MbqConfig &config, CUstream_st *stream) {
    const gemm::Params params{p, gemm_block_rows(config, p.m), gemm_block_columns(config, p.n)};
    const Grid grid{params.row_blocks * params.tile_blocks, p.splits, 1};
    const size_t shared = gemm_shared_bytes(config, B::Format::kScheme);
    return launch(gemm_kernel<B, kBlocksPerSm>, grid, B::kThreads, shared, stream, params);
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
    if (is(8, 4, 16)) return launch_gemm_block<Block<Format, 8, 4, 4, 16>, 3>(p, config, stream);
    if (is(8, 4, 32)) return launch_gemm_block<Block<Format, 8, 4, 4, 32>, 3>(p, config, stream);
    if (is(8, 4, 64)) return launch_gemm_block<Block<Format, 8, 4, 4, 64>, 2>(p, config, stream);
    if (is(8, 4, 128)) return launch_gemm_block<Block<Format, 8, 4, 4, 128>, 2>(p, config, stream);
    if (is(8, 8, 128)) return launch_gemm_block<Block<Format, 8, 8, 4, 128>, 1>(p, config, stream);
    if (is(16, 8, 128)) return launch_gemm_block<Block<Format, 16, 8, 4, 128>, 1>(p, config, stream);
    return MBQ_E_CONFIG;
}

}  // namespace mbq
