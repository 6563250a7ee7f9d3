// From a block's sums to outputs: through shared memory, so that neighbouring lanes store neighbouring columns.
//
// Parts of K on different blocks meet in `partials`: the block that arrives last adds them in index order, whatever
// the order of arrival, so that the same inputs give the same bits.
#pragma once

#include "mbq/gemm_ring.cuh"

namespace mbq {
namespace gemm {

MBQ_FN uint32_t bits_of(float a) { return bits_of_float(a); }
MBQ_FN uint32_t bits_of(int32_t a) { return static_cast<uint32_t>(a); }
MBQ_FN float sum_from(uint32_t bits, float) { return float_of_bits(bits); }
MBQ_FN int32_t sum_from(uint32_t bits, int32_t) { return static_cast<int32_t>(bits); }
MBQ_FN float plus(float a, float b) { return add_rn(a, b); }
MBQ_FN int32_t plus(int32_t a, int32_t b) { return static_cast<int32_t>(bits_of(a) + bits_of(b)); }

// Sums of the block, in shared memory [rows, pitch] words over the rings' bytes, which are done with.
template <class B>
class Outputs {
public:
    using Format = typename B::Format;
    using Sum = typename Format::Sum;
    using T = typename Format::Output;

    MBQ_FN Outputs(const LinearParams &params, const Place &place)
        : p(params), at(place), shared(shared_base()), rows(fewer(p.m - place.first_row, B::kRows)) {}

    MBQ_FN void put(const Sum (&sum)[B::kWarpTiles][B::kRowTiles][4]) const {
        const int g = lane_index() >> 2, t = lane_index() & 3;
        const int first = 16 * warp_index() * B::kWarpTiles + g;
        MBQ_UNROLL
        for (int i = 0; i < B::kWarpTiles; ++i) {
            MBQ_UNROLL
            for (int r = 0; r < B::kRowTiles; ++r) {
                MBQ_UNROLL
                for (int e = 0; e < 4; ++e)
                    sts4(address(8 * r + 2 * t + e % 2, first + 16 * i + 8 * (e / 2)), bits_of(sum[i][r][e]));
            }
        }
    }

    // After a barrier: leave the sums of this part of K. True in every thread of the block that was the last to do so.
    MBQ_FN bool last_of_parts() const {
        constexpr int kWidth = 16 * B::kTiles;
        const int column = thread_index() % kWidth;
        if (16 * at.first_tile + column < width()) {
            for (int row = thread_index() / kWidth; row < rows; row += B::kThreads / kWidth)
                store<uint32_t>(partial(block_y(), row, column), lds4(address(row, column)));
        }
        fence_device();
        block_barrier();
        if (thread_index() == 0) sts4(shared, atomic_add(p.tickets + at.ticket, 1));
        block_barrier();
        const bool last = lds4(shared) == static_cast<uint32_t>(p.splits - 1);
        fence_device();
        return last;
    }

    MBQ_FN void store_all() const {
        if (p.epilogue == MBQ_EPILOGUE_SILU_MUL)
            store_gated();
        else
            store_plain();
    }

private:
    static MBQ_FN int fewer(int a, int b) { return a < b ? a : b; }
    MBQ_FN uint32_t address(int row, int column) const {
        return shared + static_cast<uint32_t>(4 * (row * B::kShared.output_pitch + column));
    }
    MBQ_FN int width() const { return 16 * p.n_tiles; }
    MBQ_FN uint32_t *partial(int part, int row, int column) const {
        const int64_t line = static_cast<int64_t>(part) * p.m + at.first_row + row;
        return p.partials + line * width() + 16 * at.first_tile + column;
    }

    MBQ_FN Sum total(int row, int column) const {
        if (p.splits == 1) return sum_from(lds4(address(row, column)), Sum{});
#if MBQ_MUTANT == 10
        Sum sum = sum_from(load_coherent4(partial(block_y(), row, column)), Sum{});
        for (int part = 0; part < p.splits; ++part)
            if (part != block_y()) sum = plus(sum, sum_from(load_coherent4(partial(part, row, column)), Sum{}));
#else
        Sum sum = sum_from(load_coherent4(partial(0, row, column)), Sum{});
        for (int part = 1; part < p.splits; ++part)
            sum = plus(sum, sum_from(load_coherent4(partial(part, row, column)), Sum{}));
#endif
        return sum;
    }

    // A column of the block and what all its outputs share.
    struct Column {
        int index, weight_row;
        float scale, bias;
    };
    MBQ_FN Column column_at(int index) const {
        const int weight_row = 16 * at.first_tile + index;
        return {index, weight_row, Format::column_scale(p, weight_row), with_bias<T>(p, weight_row, 0.0f)};
    }
    MBQ_FN float value(int row, const Column &column) const {
        float v = Format::scaled(p, at.first_row + row, column.scale, total(row, column.index));
#if MBQ_MUTANT == 15
        v = T::to_float(T::from_float(v));
#endif
        return p.bias == nullptr ? v : add_rn(v, column.bias);
    }

    MBQ_FN void store_plain() const {
        constexpr int kWidth = 16 * B::kTiles;
        const int index = thread_index() % kWidth;
        if (16 * at.first_tile + index >= p.n) return;
        const Column column = column_at(index);
        for (int row = thread_index() / kWidth; row < rows; row += B::kThreads / kWidth)
            store_output<T>(p, at.first_row + row, column.weight_row, value(row, column));
    }

    // Tile 2i holds gate rows, tile 2i + 1 up rows of the same sixteen outputs.
    MBQ_FN void store_gated() const {
        constexpr int kWidth = 8 * B::kTiles;
        const int output = thread_index() % kWidth, index = 32 * (output / 16) + output % 16;
        const int y_column = 8 * at.first_tile + output;
        if (y_column >= p.columns) return;
        const Column gate = column_at(index), up = column_at(index + 16);
        for (int row = thread_index() / kWidth; row < rows; row += B::kThreads / kWidth)
            store_output<T>(p, at.first_row + row, y_column, mul_rn(silu(value(row, gate)), value(row, up)));
    }

    const LinearParams &p;
    const Place &at;
    const uint32_t shared;
    const int rows;
};

}  // namespace gemm
}  // namespace mbq
