// How the gemm multiplies one stage of shared memory: 16-bit weights made on the way, or int8.
//
// A lane's operand B for one 32-column block is eight neighbouring columns 8t .. 8t+7 of row g: because tiles permute
// columns within a block, one load holds both steps, and no ldmatrix is needed.
#pragma once

#include "mbq/gemm_ring.cuh"
#include "mbq/weights.cuh"

namespace mbq {
namespace gemm {

// Half a tile's words of a lane; the other words stay 0, which keeps registers free.
template <class Words>
MBQ_FN typename Words::Lane half_tile_codes(uint32_t tile, int half_tile) {
    const int lane = lane_index();
    typename Words::Lane codes{};
    if constexpr (Words::kWords == 8) {
        const Words4 four = lds16(tile + static_cast<uint32_t>(512 * half_tile + 16 * lane));
        codes.w[4 * half_tile] = four.x, codes.w[4 * half_tile + 1] = four.y;
        codes.w[4 * half_tile + 2] = four.z, codes.w[4 * half_tile + 3] = four.w;
    } else if (half_tile == 0) {
        const Words4 four = lds16(tile + static_cast<uint32_t>(16 * lane));
        codes.w[0] = four.x, codes.w[1] = four.y, codes.w[2] = four.z;
    } else {
        const Words2 two = lds8(tile + static_cast<uint32_t>(512 + 8 * lane));
        codes.w[3] = lds4(tile + static_cast<uint32_t>(16 * lane + 12)), codes.w[4] = two.x, codes.w[5] = two.y;
    }
    return codes;
}

// fp32 sums of 16-bit products; weights (u - z) * s are rounded once to T.
template <class Words, class T, uint32_t scheme>
struct Float {
    using Output = T;
    using Sum = float;
    static constexpr uint32_t kScheme = scheme;
    static constexpr bool kInt8 = false;

    // Scales and zero points of the lane's rows in one of a tile's groups.
    template <class B>
    static MBQ_FN RowPair<Words, T> rows(uint32_t slot, int tile, int group) {
        const int g = lane_index() >> 2;
        const uint32_t scales = slot + static_cast<uint32_t>(B::kScalesAt + tile * B::kShared.scale_bytes);
        const uint32_t zeros = slot + static_cast<uint32_t>(B::kZerosAt + tile * B::kShared.zero_bytes);
        const uint32_t four = lds4(zeros + static_cast<uint32_t>(8 * group + (g & 4)));
        return RowPair<Words, T>::of(lds4(scales + static_cast<uint32_t>(32 * group + 4 * g)),
                                     four >> (8 * (g & 3)) & 0xFFu);
    }

    // One panel: half a tile, two blocks of 32 columns. `pairs` are those of the columns before, unless `first`.
    template <class B>
    static MBQ_FN void multiply_panel(const LinearParams &p, uint32_t panel, uint32_t slot, int half_tile, bool first,
                                      RowPair<Words, T> (&pairs)[B::kWarpTiles],
                                      Sum (&sum)[B::kWarpTiles][B::kRowTiles][4]) {
        // Groups of 64 or 128 columns serve several blocks; large bf16 blocks have no registers to keep their rows in.
        constexpr bool kReload = T::kDtype == MBQ_BF16 && B::kRows > 32;
        const int first_tile = warp_index() * B::kWarpTiles;
        typename Words::Lane codes[B::kWarpTiles];
        MBQ_UNROLL
        for (int i = 0; i < B::kWarpTiles; ++i) {
            const uint32_t tile = slot + static_cast<uint32_t>((first_tile + i) * B::kShared.tile_bytes);
            codes[i] = half_tile_codes<Words>(tile, half_tile);
        }
        MBQ_UNROLL
        for (int block = 0; block < 2; ++block) {
            const int column = 64 * half_tile + 32 * block;
            const bool begins = kReload || (first && block == 0) || (column & ((1 << p.group_shift) - 1)) == 0;
            uint32_t a[B::kWarpTiles][8];
            MBQ_UNROLL
            for (int i = 0; i < B::kWarpTiles; ++i) {
                if (begins) pairs[i] = rows<B>(slot, first_tile + i, column >> p.group_shift);
                pairs[i].block(codes[i], half_tile, block, a[i]);
            }
            multiply_block<B>(panel, block, a, sum);
        }
    }

    template <class B>
    static MBQ_FN void multiply_block(uint32_t panel, int block, const uint32_t (&a)[B::kWarpTiles][8],
                                      Sum (&sum)[B::kWarpTiles][B::kRowTiles][4]) {
        const int g = lane_index() >> 2, t = lane_index() & 3;
        const uint32_t mine = panel + static_cast<uint32_t>(swizzled<Float>(g, 4 * block + t));
        MBQ_UNROLL
        for (int r = 0; r < B::kRowTiles; ++r) {
            const Words4 x = lds16(mine + static_cast<uint32_t>(1024 * r));
            MBQ_UNROLL
            for (int i = 0; i < B::kWarpTiles; ++i) {
                const uint32_t first[4] = {a[i][0], a[i][1], a[i][2], a[i][3]};
                T::mma(sum[i][r], first, x.x, x.y);
            }
            MBQ_UNROLL
            for (int i = 0; i < B::kWarpTiles; ++i) {
                const uint32_t second[4] = {a[i][4], a[i][5], a[i][6], a[i][7]};
                T::mma(sum[i][r], second, x.z, x.w);
            }
        }
    }

    template <class B>
    static MBQ_FN void multiply(const LinearParams &p, uint32_t stage, uint32_t slot, int stage_of_tile,
                                Sum (&sum)[B::kWarpTiles][B::kRowTiles][4]) {
        RowPair<Words, T> pairs[B::kWarpTiles];
        MBQ_UNROLL
        for (int panel = 0; panel < B::kShared.panels; ++panel)
            multiply_panel<B>(p, stage + static_cast<uint32_t>(panel * B::kPanelBytes), slot, stage_of_tile + panel,
                              panel == 0, pairs, sum);
    }

    // What one output multiplies: nothing, the weights are scaled.
    static MBQ_FN float column_scale(const LinearParams &, int) { return 1.0f; }
    static MBQ_FN float scaled(const LinearParams &, int, float, Sum sum) { return sum; }
};

// int8 products of 16 * q and xq. Per channel: int32 sums over all of K. Grouped by 128: fp32 sums of the groups'.
template <class T, bool kGrouped>
struct Int8 {
    using Output = T;
    using Sum = typename std::conditional<kGrouped, float, int32_t>::type;
    static constexpr uint32_t kScheme = MBQ_W4A8;
    static constexpr bool kInt8 = true;

    // Address of the lane's eight bytes of block 0; bits 5 and 6 of the chunk are the block, but for the swizzle.
    static MBQ_FN uint32_t x_address(uint32_t stage, int block) {
        const int g = lane_index() >> 2, t = lane_index() & 3;
        return stage + static_cast<uint32_t>(swizzled<Int8>(g, 2 * block + t / 2) + 8 * (t & 1));
    }

    template <class B>
    static MBQ_FN void multiply(const LinearParams &, uint32_t stage, uint32_t slot, int,
                                Sum (&sum)[B::kWarpTiles][B::kRowTiles][4]) {
        uint32_t a[B::kWarpTiles][4][4];
        MBQ_UNROLL
        for (int i = 0; i < B::kWarpTiles; ++i) {
            const int tile = warp_index() * B::kWarpTiles + i;
            const uint32_t address = slot + static_cast<uint32_t>(tile * B::kShared.tile_bytes);
            const W4::Lane codes = W4::from_shared(address, lane_index());
            MBQ_UNROLL
            for (int block = 0; block < 4; ++block) int8_fragments(codes, block, a[i][block]);
        }
        uint32_t addresses[4];
        MBQ_UNROLL
        for (int block = 0; block < 4; ++block) addresses[block] = x_address(stage, block);
        float scales[B::kWarpTiles][2];
        if constexpr (kGrouped) {
            MBQ_UNROLL
            for (int i = 0; i < B::kWarpTiles; ++i) load_scales<B>(slot, i, scales[i]);
        }
        MBQ_UNROLL
        for (int r = 0; r < B::kRowTiles; ++r) {
            Words2 x[4];
            MBQ_UNROLL
            for (int block = 0; block < 4; ++block) x[block] = lds8(addresses[block] + static_cast<uint32_t>(1024 * r));
            MBQ_UNROLL
            for (int i = 0; i < B::kWarpTiles; ++i) {
                if constexpr (kGrouped)
                    add_group(a[i], x, scales[i], sum[i][r]);
                else
                    add_blocks(a[i], x, sum[i][r]);
            }
        }
    }

    static MBQ_FN void add_blocks(const uint32_t (&a)[4][4], const Words2 (&x)[4], int32_t (&sum)[4]) {
        MBQ_UNROLL
        for (int block = 0; block < 4; ++block) mma_s8(sum, a[block], x[block].x, x[block].y);
    }

    static MBQ_FN void add_group(const uint32_t (&a)[4][4], const Words2 (&x)[4], const float (&scales)[2],
                                 float (&total)[4]) {
        int32_t sum[4] = {0, 0, 0, 0};
        add_blocks(a, x, sum);
        MBQ_UNROLL
        for (int e = 0; e < 4; ++e) total[e] = add_rn(total[e], mul_rn(to_float(sum[e]), scales[e / 2]));
    }

    template <class B>
    static MBQ_FN void load_scales(uint32_t slot, int i, float (&scales)[2]) {
        const int tile = warp_index() * B::kWarpTiles + i, g = lane_index() >> 2;
        const uint32_t pair =
            lds4(slot + static_cast<uint32_t>(B::kScalesAt + tile * B::kShared.scale_bytes + 4 * g));
        scales[0] = F16::to_float(pair & 0xFFFFu);
        scales[1] = F16::to_float(pair >> 16);
    }

    // Both products are rounded, in this order: it is part of the format. Grouped sums still hold 16 * q.
    static MBQ_FN float column_scale(const LinearParams &p, int weight_row) {
        if constexpr (kGrouped) return 1.0f / 16.0f;
        return float_of_bits(load4(p.scales + 4 * static_cast<size_t>(weight_row)));
    }
    static MBQ_FN float scaled(const LinearParams &p, int row, float column_scale, Sum sum) {
        float value;
        if constexpr (kGrouped)
            value = sum;
        else
            value = to_float(sum);
        return mul_rn(mul_rn(value, column_scale), float_of_bits(load4(p.x_scales + row)));
    }
};

}  // namespace gemm
}  // namespace mbq
