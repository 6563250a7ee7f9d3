// From packed codes to MMA fragments: one lane's words of a tile, and the exact integers u - z in 16 bit.
//
// A tile is 16 rows x 128 columns; a lane's words hold rows g and g + 8 and, in each 32-column block, columns
// 8t .. 8t+7 (docs/formats/tiles.md). `fragments` yields, for half a tile, four steps of m16n8k16 operand A:
// d[4 * step + r], r = 2h + half, each a pair of 16-bit numbers.
//
// Magic numbers: or-ing a code into the mantissa of 1024.0 (fp16) or 128.0 (bf16) gives 1024 + u exactly, at another bit
// position 1024 + 8 u or + 64 u. One addition, or one fused multiply-add, then gives u - z without rounding.
#pragma once

#include "mbq/arch.cuh"
#include "mbq/layout.h"

namespace mbq {

// Both halves of a word.
MBQ_CONSTEXPR uint32_t twice(uint32_t half) { return half * 0x00010001u; }

// 3-bit tiles: 16 bytes and 8 bytes per lane; two triples of words, 16 fragment registers each.
struct W3 {
    static constexpr int kTileBytes = MBQ_W3T_TILE_BYTES;
    static constexpr int kWords = 6;
    struct Lane {
        uint32_t w[kWords];
    };

    // Where a lane's two pieces lie in the first tile of a row: a step is then one multiply-add each.
    struct Cursor {
        const uint8_t *a, *b;
    };
    static MBQ_FN Cursor cursor(const uint8_t *tiles, int lane) {
        return {settled(tiles + 16 * lane), settled(tiles + 512 + 8 * lane)};
    }
    static MBQ_FN Lane stream(const Cursor &at, uint32_t tile, Site site = MBQ_SITE) {
        const Words4 a = load_stream16(at.a + static_cast<uint64_t>(tile) * kTileBytes, site);
        const Words2 b = load_stream8(at.b + static_cast<uint64_t>(tile) * kTileBytes, site);
        return {{a.x, a.y, a.z, a.w, b.x, b.y}};
    }
    static MBQ_FN Lane from_shared(uint32_t tile, int lane, Site site = MBQ_SITE) {
        const Words4 a = lds16(tile + 16 * lane, site);
        const Words2 b = lds8(tile + 512 + 8 * lane, site);
        return {{a.x, a.y, a.z, a.w, b.x, b.y}};
    }
};

// 4-bit tiles: two planes of 16 bytes per lane; word 2b + half.
struct W4 {
    static constexpr int kTileBytes = MBQ_W4T_TILE_BYTES;
    static constexpr int kWords = 8;
    struct Lane {
        uint32_t w[kWords];
    };

    struct Cursor {
        const uint8_t *a;
    };
    static MBQ_FN Cursor cursor(const uint8_t *tiles, int lane) { return {settled(tiles + 16 * lane)}; }
    static MBQ_FN Lane stream(const Cursor &at, uint32_t tile, Site site = MBQ_SITE) {
        const uint8_t *from = at.a + static_cast<uint64_t>(tile) * kTileBytes;
        const Words4 a = load_stream16(from, site);
        const Words4 b = load_stream16(from + 512, site);
        return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
    }
    static MBQ_FN Lane from_shared(uint32_t tile, int lane, Site site = MBQ_SITE) {
        const Words4 a = lds16(tile + 16 * lane, site);
        const Words4 b = lds16(tile + 512 + 16 * lane, site);
        return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
    }
};

// `Dequant<Words, T>`: Zero = what a row's zero point turns into; fragments as described above.
template <class Words, class T>
struct Dequant;

template <>
struct Dequant<W3, F16> {
    struct Zero {
        uint32_t c[3]; // -(1024 + z), -(128 + z), -(16 + z)
    };
    static MBQ_FN Zero zero(uint32_t z) {
        return {{twice(0xE400) + z * twice(1), twice(0xD800) + z * twice(8), twice(0xCC00) + z * twice(0x40)}};
    }
    static MBQ_FN uint32_t value(uint32_t magic, int field, const Zero &z) {
        if (field == 0) return F16::add2(magic, z.c[0]);
        return F16::fma2(magic, field == 1 ? twice(0x3000) /* 1/8 */ : twice(0x2400) /* 1/64 */, z.c[field]);
    }
    static MBQ_FN void fragments(const W3::Lane &lane, int half_tile, const Zero &low, const Zero &high,
                                 uint32_t (&d)[16]) {
        uint32_t rest = twice(0x6400); // bit 15 of each half of three words: the sixteenth pair
        MBQ_UNROLL
        for (int i = 0; i < 3; ++i) {
            const uint32_t w = lane.w[3 * half_tile + i];
            const uint32_t v = w >> 9;
            const uint32_t magic[5] = {
                and_or(w, twice(0x0007), twice(0x6400)), and_or(w, twice(0x0038), twice(0x6400)),
                and_or(w, twice(0x01C0), twice(0x6400)), and_or(v, twice(0x0007), twice(0x6400)),
                and_or(v, twice(0x0038), twice(0x6400))};
            MBQ_UNROLL
            for (int f = 0; f < 5; ++f) {
                const int j = 5 * i + f;
                d[j] = value(magic[f], f % 3, j % 2 == 0 ? low : high);
            }
            rest = and_or(w >> (15 - i), twice(1u << i), rest);
        }
        d[15] = F16::add2(rest, high.c[0]);
    }
};

template <>
struct Dequant<W3, BF16> {
    struct Zero {
        uint32_t c[2]; // -(128 + z), -(16 + z)
    };
    static MBQ_FN Zero zero(uint32_t z) { return {{twice(0xC300) + z * twice(1), twice(0xC180) + z * twice(8)}}; }
    static MBQ_FN void fragments(const W3::Lane &lane, int half_tile, const Zero &low, const Zero &high,
                                 uint32_t (&d)[16]) {
        uint32_t rest = twice(0x4300);
        MBQ_UNROLL
        for (int i = 0; i < 3; ++i) {
            const uint32_t w = lane.w[3 * half_tile + i];
            const uint32_t v = w >> 6, u = w >> 12;
            const uint32_t magic[5] = {
                and_or(w, twice(0x0007), twice(0x4300)), and_or(w, twice(0x0038), twice(0x4300)),
                and_or(v, twice(0x0007), twice(0x4300)), and_or(v, twice(0x0038), twice(0x4300)),
                and_or(u, twice(0x0007), twice(0x4300))};
            MBQ_UNROLL
            for (int f = 0; f < 5; ++f) {
                const int j = 5 * i + f;
                const Zero &z = j % 2 == 0 ? low : high;
                d[j] = f % 2 == 0 ? BF16::add2(magic[f], z.c[0]) : BF16::fma2(magic[f], twice(0x3E00) /* 1/8 */, z.c[1]);
            }
            rest = and_or(w >> (15 - i), twice(1u << i), rest);
        }
        d[15] = BF16::add2(rest, high.c[0]);
    }
};

template <>
struct Dequant<W4, F16> {
    struct Zero {
        uint32_t c[2]; // -(1024 + z), -(64 + z)
    };
    static MBQ_FN Zero zero(uint32_t z) { return {{twice(0xE400) + z * twice(1), twice(0xD400) + z * twice(0x10)}}; }
    static MBQ_FN void fragments(const W4::Lane &lane, int half_tile, const Zero &low, const Zero &high,
                                 uint32_t (&d)[16]) {
        MBQ_UNROLL
        for (int i = 0; i < 4; ++i) { // word 2b + half of this half tile
            const uint32_t w = lane.w[4 * half_tile + i];
            const uint32_t v = w >> 8;
            const Zero &z = i % 2 == 0 ? low : high;
            const int at = 8 * (i / 2) + i % 2; // register of step s, h: at + 4 s + 2 h
            // Pairs of columns (0,1) (2,3) (4,5) (6,7) lie at bits 4, 12, 0, 8.
            d[at] = F16::fma2(and_or(w, twice(0x00F0), twice(0x6400)), twice(0x2C00) /* 1/16 */, z.c[1]);
            d[at + 2] = F16::fma2(and_or(v, twice(0x00F0), twice(0x6400)), twice(0x2C00), z.c[1]);
            d[at + 4] = F16::add2(and_or(w, twice(0x000F), twice(0x6400)), z.c[0]);
            d[at + 6] = F16::add2(and_or(v, twice(0x000F), twice(0x6400)), z.c[0]);
        }
    }
};

template <>
struct Dequant<W4, BF16> {
    struct Zero {
        uint32_t c[1]; // -(128 + z)
    };
    static MBQ_FN Zero zero(uint32_t z) { return {{twice(0xC300) + z * twice(1)}}; }
    static MBQ_FN void fragments(const W4::Lane &lane, int half_tile, const Zero &low, const Zero &high,
                                 uint32_t (&d)[16]) {
        MBQ_UNROLL
        for (int i = 0; i < 4; ++i) {
            const uint32_t w = lane.w[4 * half_tile + i];
            const Zero &z = i % 2 == 0 ? low : high;
            const int at = 8 * (i / 2) + i % 2;
            d[at] = BF16::add2(and_or(w >> 4, twice(0x000F), twice(0x4300)), z.c[0]);
            d[at + 2] = BF16::add2(and_or(w >> 12, twice(0x000F), twice(0x4300)), z.c[0]);
            d[at + 4] = BF16::add2(and_or(w, twice(0x000F), twice(0x4300)), z.c[0]);
            d[at + 6] = BF16::add2(and_or(w >> 8, twice(0x000F), twice(0x4300)), z.c[0]);
        }
    }
};

// Signed 4-bit tiles as int8: operand A of m16n8k32 for 32-column block b, each byte 16 * q (the 1/16 is in the scale).
MBQ_FN void int8_fragments(const W4::Lane &lane, int block, uint32_t (&a)[4]) {
    const uint32_t low = lane.w[2 * block], high = lane.w[2 * block + 1];
    a[0] = low & 0xF0F0F0F0u;
    a[1] = high & 0xF0F0F0F0u;
    a[2] = (low << 4) & 0xF0F0F0F0u;
    a[3] = (high << 4) & 0xF0F0F0F0u;
}

}  // namespace mbq
