// Fused dequantize and multiply for few rows of activations (M <= 8): decode, bound by the bytes of the weights.
//
//     block  = NT tiles of 16 weight rows; its warps share the k tiles: warp w takes k tiles w, w + warps, ...
//     warp   = per k tile: codes through registers (ring of DEPTH), 8 MMA steps with weights as operand A, x as B
//     end    = warps' sums meet in shared memory, added in warp order; parts of K on other blocks in part order
//
// Same input, same bits: nothing is added in order of arrival. Columns of B past M repeat the last row of x: they only
// reach columns of the result that nobody stores, and need no branch.
#pragma once

#include "mbq/dequant.cuh"
#include "mbq/linear.cuh"
#include "mbq/skinny_configs.h"

#ifndef MBQ_MUTANT
#define MBQ_MUTANT 0 // each number plants one known defect, so that tests can show that they would see it
#endif

namespace mbq {

constexpr int kTileRows = MBQ_TILE_ROWS, kTileColumns = MBQ_TILE_COLUMNS;

// Weights as 16-bit integers, fp32 sums per group, scaled into fp32 totals. kGroups: groups per tile (1, 2, 4).
template <class Words, class T, int kGroups>
struct WeightOnly {
    using Output = T;
    using Sum = float;
    static constexpr int kGroupsPerTile = kGroups;
    struct Tile {
        typename Words::Lane codes;
        uint32_t scales[kGroups], zeros[kGroups];
    };
    struct X {
        Words4 block[4]; // columns 32b + 8t .. + 7: B fragments of steps 2b and 2b + 1
    };

    // Where a lane begins to read a row of tiles.
    struct Row {
        typename Words::Cursor codes;
        const uint8_t *scales, *zeros;
    };
    static MBQ_FN Row row(const LinearParams &p, int n_tile, int lane) {
        const size_t row = static_cast<size_t>(n_tile), g = static_cast<size_t>(lane >> 2);
        return {Words::cursor(p.codes + row * p.k_tiles * Words::kTileBytes, lane),
                settled(p.scales + (row * p.groups * 8 + g) * 4), settled(p.zeros + row * p.groups * 8 + g)};
    }
    static MBQ_FN Tile load(const Row &row, uint32_t k_tile) {
        Tile tile;
        tile.codes = Words::stream(row.codes, k_tile);
        MBQ_UNROLL
        for (uint32_t j = 0; j < kGroups; ++j) {
#if MBQ_MUTANT == 12
            const uint32_t group = k_tile * kGroups + j > 0 ? k_tile * kGroups + j - 1 : 0;
#else
            const uint32_t group = k_tile * kGroups + j;
#endif
            tile.scales[j] = load_stream4(row.scales + static_cast<uint64_t>(group) * 32);
            tile.zeros[j] = load1(row.zeros + static_cast<uint64_t>(group) * 8);
        }
        return tile;
    }
    // Where a lane's columns of row-major x begin.
    static MBQ_FN const uint8_t *x_row(const LinearParams &p, int row, int lane) {
        return settled(p.x + (static_cast<size_t>(row) * p.k + 8 * (lane & 3)) * 2);
    }
    static MBQ_FN X load_x(const uint8_t *x_row, uint32_t k_tile) {
        X x;
        const uint8_t *at = x_row + static_cast<uint64_t>(k_tile) * (2 * kTileColumns);
        MBQ_UNROLL
        for (int b = 0; b < 4; ++b) x.block[b] = load16(at + (MBQ_MUTANT == 14 ? 72 : 64) * b);
        return x;
    }
    // Of the last tile only `columns` exist in x; zeros stand for the rest, since a NaN there times zero is a NaN.
    static MBQ_FN X load_x_part(const uint8_t *x_row, uint32_t k_tile, int columns) {
        X x;
        const uint8_t *at = x_row + static_cast<uint64_t>(k_tile) * (2 * kTileColumns);
        MBQ_UNROLL
        for (int b = 0; b < 4; ++b) {
            x.block[b] = {0, 0, 0, 0};
            if (32 * b + 8 * (lane_index() & 3) < columns || MBQ_MUTANT == 8)
                x.block[b] = load16(at + 64 * b);
        }
        return x;
    }
    static MBQ_FN int whole_tiles(const LinearParams &p) { return p.k / kTileColumns; }
    static MBQ_FN void multiply(const Tile &tile, const X &x, float (&total)[4]) {
        float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        uint32_t d[16] = {};
        typename Dequant<Words, T>::Zero low = {}, high = {};
        MBQ_UNROLL
        for (int step = 0; step < 8; ++step) {
            constexpr int kSteps = 8 / kGroups;
            const int group = step / kSteps;
            if (step % kSteps == 0) {
#if MBQ_MUTANT == 11
                low = Dequant<Words, T>::zero(tile.zeros[group] >> 4);
                high = Dequant<Words, T>::zero(tile.zeros[group] & 15);
#else
                low = Dequant<Words, T>::zero(tile.zeros[group] & 15);
                high = Dequant<Words, T>::zero(tile.zeros[group] >> 4);
#endif
            }
            if (kGroups == 4 ? step % 2 == 0 : step % 4 == 0)
                Dequant<Words, T>::fragments(tile.codes, step / 4, low, high, d);
            const Words4 &b = x.block[step / 2];
#if MBQ_MUTANT == 5
            const bool first = step % 2 != 0;
#else
            const bool first = step % 2 == 0;
#endif
            const int at = 4 * (step % 4);
#if MBQ_MUTANT == 4
            const uint32_t a[4] = {d[at + 1], d[at], d[at + 3], d[at + 2]};
#else
            const uint32_t a[4] = {d[at], d[at + 1], d[at + 2], d[at + 3]};
#endif
            T::mma(sum, a, first ? b.x : b.z, first ? b.y : b.w);
            if (step % kSteps == kSteps - 1) {
                const float s_low = F16::to_float(tile.scales[group] & 0xFFFF);
                const float s_high = F16::to_float(tile.scales[group] >> 16);
                MBQ_UNROLL
                for (int e = 0; e < 4; ++e) {
                    total[e] = fma_rn(e < 2 ? s_low : s_high, sum[e], total[e]);
                    sum[e] = 0.0f;
                }
            }
        }
    }
    static MBQ_FN float scaled(const LinearParams &, int, int, float total) { return total; }
};

// Weights as 16 * q in int8, x in int8. Per channel: int32 sums over all of K. Grouped (128): fp32 totals.
template <class T, bool kGrouped>
struct Int8 {
    using Output = T;
    using Sum = typename std::conditional<kGrouped, float, int32_t>::type;
    static constexpr int kGroupsPerTile = kGrouped;
    struct Tile {
        W4::Lane codes;
        uint32_t scales;
    };
    struct X {
        Words2 block[4];
    };

    struct Row {
        W4::Cursor codes;
        const uint8_t *scales;
    };
    static MBQ_FN Row row(const LinearParams &p, int n_tile, int lane) {
        const size_t row = static_cast<size_t>(n_tile), g = static_cast<size_t>(lane >> 2);
        return {W4::cursor(p.codes + row * p.k_tiles * W4::kTileBytes, lane),
                settled(p.scales + (row * p.groups * 8 + g) * 4)};
    }
    static MBQ_FN Tile load(const Row &row, uint32_t k_tile) {
        Tile tile;
        tile.codes = W4::stream(row.codes, k_tile);
        tile.scales = kGrouped ? load_stream4(row.scales + static_cast<uint64_t>(k_tile) * 32) : 0;
        return tile;
    }
    static MBQ_FN const uint8_t *x_row(const LinearParams &p, int row, int lane) {
        return settled(p.x + static_cast<size_t>(row) * p.k_tiles * kTileColumns + 8 * (lane & 3));
    }
    static MBQ_FN X load_x(const uint8_t *x_row, uint32_t k_tile) {
        X x;
        const uint8_t *at = x_row + static_cast<uint64_t>(k_tile) * kTileColumns;
        MBQ_UNROLL
        for (int b = 0; b < 4; ++b) x.block[b] = load8(at + 32 * b);
        return x;
    }
    static MBQ_FN X load_x_part(const uint8_t *x_row, uint32_t k_tile, int) { return load_x(x_row, k_tile); }
    static MBQ_FN int whole_tiles(const LinearParams &p) { return p.k_tiles; } // int8 rows are padded with zeros
    static MBQ_FN void multiply(const Tile &tile, const X &x, Sum (&total)[4]) {
        int32_t sum[4] = {0, 0, 0, 0};
        MBQ_UNROLL
        for (int b = 0; b < 4; ++b) {
            uint32_t a[4];
            int8_fragments(tile.codes, b, a);
            mma_s8(sum, a, x.block[b].x, x.block[b].y);
        }
        MBQ_UNROLL
        for (int e = 0; e < 4; ++e) {
            if constexpr (kGrouped) {
                const float s = F16::to_float(e < 2 ? tile.scales & 0xFFFF : tile.scales >> 16);
                total[e] = add_rn(total[e], mul_rn(to_float(sum[e]), s));
            } else {
                total[e] += sum[e];
            }
        }
    }
    // The format's order: times the weight's scale, then times the token's, each product rounded.
    static MBQ_FN float scaled(const LinearParams &p, int weight_row, int row, Sum total) {
        const float sx = float_of_bits(load4(p.x_scales + row));
        if constexpr (kGrouped) {
            return mul_rn(mul_rn(total, 0.0625f), sx);
        } else {
            const float sw = float_of_bits(load4(p.scales + 4 * static_cast<size_t>(weight_row)));
            return mul_rn(mul_rn(to_float(total), sw), sx);
        }
    }
};

// Sums travel through memory as words.
MBQ_FN uint32_t word_of(float a) { return bits_of_float(a); }
MBQ_FN uint32_t word_of(int32_t a) { return static_cast<uint32_t>(a); }
MBQ_FN float plus(float a, float b) { return add_rn(a, b); }
MBQ_FN int32_t plus(int32_t a, int32_t b) { return a + b; }
template <class Sum>
MBQ_FN Sum sum_of(uint32_t word);
template <>
MBQ_FN float sum_of<float>(uint32_t word) { return float_of_bits(word); }
template <>
MBQ_FN int32_t sum_of<int32_t>(uint32_t word) { return static_cast<int32_t>(word); }

// Add the warps' sums of one element in warp order.
template <class Sum>
MBQ_FN Sum over_warps(uint32_t shared, int warps, int per_warp, int element) {
    Sum total = sum_of<Sum>(lds4(shared + 4 * element));
    for (int w = 1; w < warps; ++w) total = plus(total, sum_of<Sum>(lds4(shared + 4 * (w * per_warp + element))));
    return total;
}

// True in every thread of the block that arrives last at its column of blocks; its tickets word counts arrivals.
MBQ_FN bool arrives_last(const LinearParams &p, uint32_t flag) {
    fence_device();
    block_barrier();
    if (thread_index() == 0) sts4(flag, atomic_add(p.tickets + block_x(), 1));
    block_barrier();
    return lds4(flag) == static_cast<uint32_t>(p.splits - 1);
}

template <class Format>
MBQ_FN void finish(const LinearParams &p, int row, int first_row, int r, typename Format::Sum total) {
    const int weight_row = first_row + r;
    if (weight_row >= p.n) return;
    store_output<typename Format::Output>(
        p, row, weight_row,
        with_bias<typename Format::Output>(p, weight_row, Format::scaled(p, weight_row, row, total)));
}

// Tile 2i holds gate rows, tile 2i + 1 up rows: column 16 i + r of the result is silu(gate) * up.
template <class Format>
MBQ_FN void finish_gated(const LinearParams &p, int row, int first_row, int r, typename Format::Sum gate,
                         typename Format::Sum up) {
    using T = typename Format::Output;
    const int gate_row = first_row + r, up_row = gate_row + kTileRows, column = first_row / 2 + r;
    if (column >= p.columns) return;
    const float a = with_bias<T>(p, gate_row, Format::scaled(p, gate_row, row, gate));
    const float b = with_bias<T>(p, up_row, Format::scaled(p, up_row, row, up));
    store_output<T>(p, row, column, mul_rn(silu(a), b));
}

// One element of the block's result: the sum over warps here, over parts of K if there are several.
template <class Format>
MBQ_FN typename Format::Sum element_sum(const LinearParams &p, uint32_t shared, int warps, int rows, int row, int r) {
    using Sum = typename Format::Sum;
    if (p.splits == 1) return over_warps<Sum>(shared, warps, rows * p.m, row * rows + r);
    const size_t width = static_cast<size_t>(p.n_tiles) * kTileRows;
    const uint32_t *part = p.partials + static_cast<size_t>(row) * width + static_cast<size_t>(block_x()) * rows + r;
#if MBQ_MUTANT == 10
    Sum total = sum_of<Sum>(load_coherent4(part + static_cast<size_t>(block_y()) * p.m * width));
    for (int s = 0; s < p.splits; ++s)
        if (s != block_y()) total = plus(total, sum_of<Sum>(load_coherent4(part + static_cast<size_t>(s) * p.m * width)));
#else
    Sum total = sum_of<Sum>(load_coherent4(part));
    for (int s = 1; s < p.splits; ++s)
        total = plus(total, sum_of<Sum>(load_coherent4(part + static_cast<size_t>(s) * p.m * width)));
#endif
    return total;
}

template <class Format, int NT>
MBQ_FN void reduce_and_store(const LinearParams &p, const typename Format::Sum (&total)[NT][4]) {
    constexpr int kRows = NT * kTileRows;
    const int lane = lane_index(), g = lane >> 2, t = lane & 3, warps = block_threads() / 32;
    const uint32_t shared = shared_base();
    MBQ_UNROLL
    for (int i = 0; i < NT; ++i)
        MBQ_UNROLL
        for (int e = 0; e < 4; ++e) {
            const int r = i * kTileRows + g + 8 * (e >> 1), row = 2 * t + (e & 1);
#if MBQ_MUTANT == 7
            if (row < kSkinnyRows)
#else
            if (row < p.m)
#endif
                sts4(shared + 4 * ((warp_index() * p.m + row) * kRows + r), word_of(total[i][e]));
        }
#if MBQ_MUTANT != 1
    block_barrier();
#endif
    const int first_row = block_x() * kRows;
    if (p.splits > 1) {
        const size_t width = static_cast<size_t>(p.n_tiles) * kTileRows;
        for (int o = thread_index(); o < kRows * p.m; o += block_threads()) {
            const int row = o / kRows, r = o % kRows;
            if (first_row + r >= static_cast<int>(width)) continue;
            const size_t at = (static_cast<size_t>(block_y()) * p.m + row) * width + first_row + r;
            store<uint32_t>(p.partials + at,
                            word_of(over_warps<typename Format::Sum>(shared, warps, kRows * p.m, row * kRows + r)));
        }
        if (!arrives_last(p, shared + 4 * warps * p.m * kRows)) return;
        fence_device();
    }
    const bool gated = p.epilogue == MBQ_EPILOGUE_SILU_MUL;
    const int outputs = gated ? kRows / 2 : kRows;
    for (int o = thread_index(); o < outputs * p.m; o += block_threads()) {
        const int row = o / outputs, r = o % outputs;
        if (first_row + r >= p.n) continue;
        const auto sum = element_sum<Format>(p, shared, warps, kRows, row, r);
        if (gated)
            finish_gated<Format>(p, row, first_row, r, sum,
                                 element_sum<Format>(p, shared, warps, kRows, row, r + kTileRows));
        else
            finish<Format>(p, row, first_row, r, sum);
    }
}

// Grid: x = ceil(n_tiles / NT), y = splits. Tiles past n_tiles repeat the last one and are not stored.
template <class Format, int NT, int DEPTH>
MBQ_KERNEL MBQ_BOUNDS(32 * most_skinny_warps(NT, Format::kGroupsPerTile), 1) skinny(const LinearParams p) {
    const int warps = block_threads() / 32, stride = warps;
    const int per_split = (p.k_tiles + p.splits - 1) / p.splits;
    const int begin = block_y() * per_split + warp_index();
    const int end = begin - warp_index() + per_split < p.k_tiles ? begin - warp_index() + per_split : p.k_tiles;

    const int lane = lane_index(), g = lane >> 2;
    const uint8_t *x_row = Format::x_row(p, g < p.m ? g : p.m - 1, lane);
    typename Format::Row rows[NT];
    MBQ_UNROLL
    for (int i = 0; i < NT; ++i) {
        const int n_tile = block_x() * NT + i;
        rows[i] = Format::row(p, n_tile < p.n_tiles ? n_tile : p.n_tiles - 1, lane);
    }
    typename Format::Sum total[NT][4] = {};
    // DEPTH tiles on their way while one is multiplied; the slots take turns, so that no register is copied.
    constexpr int kSlots = DEPTH + 1;
    typename Format::Tile tiles[kSlots][NT];
    typename Format::X x[kSlots];
    const auto load = [&](int slot, int k_tile) {
        MBQ_UNROLL
        for (int i = 0; i < NT; ++i) tiles[slot][i] = Format::load(rows[i], k_tile);
        x[slot] = Format::load_x(x_row, k_tile);
    };
    const int whole = Format::whole_tiles(p), last = end < whole ? end : whole;

    MBQ_UNROLL
    for (int slot = 0; slot < DEPTH; ++slot)
        if (begin + slot * stride < last) load(slot, begin + slot * stride);
    for (int base = begin; base < last; base += kSlots * stride) {
        MBQ_UNROLL
        for (int slot = 0; slot < kSlots; ++slot) {
            const int k_tile = base + slot * stride;
            if (k_tile >= last) break;
            if (k_tile + DEPTH * stride < last) load((slot + DEPTH) % kSlots, k_tile + DEPTH * stride);
            MBQ_UNROLL
            for (int i = 0; i < NT; ++i) Format::multiply(tiles[slot][i], x[slot], total[i]);
        }
    }
    if (whole < end && (whole - begin) % stride == 0 && whole >= begin) {
        const typename Format::X part = Format::load_x_part(x_row, whole, p.k - whole * kTileColumns);
        MBQ_UNROLL
        for (int i = 0; i < NT; ++i) Format::multiply(Format::load(rows[i], whole), part, total[i]);
    }
    reduce_and_store<Format, NT>(p, total);
}

// Launch the instance of a config; MBQ_E_CONFIG if there is none.
template <class Format>
MBQ_HOST_FN int launch_skinny(const LinearParams &p, const MbqConfig &config, CUstream_st *stream) {
    const Grid grid{(p.n_tiles + config.n_tiles - 1) / config.n_tiles, p.splits, 1};
    const int threads = 32 * config.warps;
    const size_t shared = skinny_shared_bytes(config.warps, p.m, config.n_tiles);
    if (config.n_tiles == 1 && config.depth == 2) return launch(skinny<Format, 1, 2>, grid, threads, shared, stream, p);
    if (config.n_tiles == 2 && config.depth == 1) return launch(skinny<Format, 2, 1>, grid, threads, shared, stream, p);
    if (config.n_tiles == 2 && config.depth == 2) return launch(skinny<Format, 2, 2>, grid, threads, shared, stream, p);
    return MBQ_E_CONFIG;
}

}  // namespace mbq
