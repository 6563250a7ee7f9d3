/*
 * Bits, tiles and layout versions of the kernel library.
 *
 * Generated from mbq_export/schemes; do not edit. Make it again:
 *     python -m mbq_export.schemes.layouts.header kernels/include/mbq/layout.h
 * What the bytes of a tile mean: docs/formats/tiles.md. C99 and C++17.
 */
#ifndef MBQ_LAYOUT_H
#define MBQ_LAYOUT_H

/* The version of every tile layout; a tile, and what the lanes of a warp own of it. */
enum {
    MBQ_LAYOUT_VERSION = 1,
    MBQ_TILE_ROWS = 16,
    MBQ_TILE_COLUMNS = 128,
    MBQ_LANES = 32,
    MBQ_SLOTS = 32,
    MBQ_COLUMN_ALIGNMENT = 8,
    MBQ_INT8_FACTOR = 16
};

/* Layout w3t. */
enum {
    MBQ_W3T_BITS = 3,
    MBQ_W3T_LANE_WORDS = 6,
    MBQ_W3T_TILE_BYTES = 768
};

/* Layout w4t. */
enum {
    MBQ_W4T_BITS = 4,
    MBQ_W4T_LANE_WORDS = 8,
    MBQ_W4T_TILE_BYTES = 1024
};

/* Byte j of four columns of w4t, and of int8 activations, is column order[j]. */
#define MBQ_BYTE_ORDER {0, 2, 1, 3}

/* Scheme w3a16. GROUPS: sum of its group sizes; CHANNEL: 1 if it may have one scale per output. */
enum {
    MBQ_SCHEME_W3A16 = 1,
    MBQ_W3A16_BITS = 3,
    MBQ_W3A16_ACT_BITS = 16,
    MBQ_W3A16_SYMMETRIC = 0,
    MBQ_W3A16_GROUPS = 224,
    MBQ_W3A16_CHANNEL = 0
};

/* Scheme w4a16. GROUPS: sum of its group sizes; CHANNEL: 1 if it may have one scale per output. */
enum {
    MBQ_SCHEME_W4A16 = 2,
    MBQ_W4A16_BITS = 4,
    MBQ_W4A16_ACT_BITS = 16,
    MBQ_W4A16_SYMMETRIC = 0,
    MBQ_W4A16_GROUPS = 224,
    MBQ_W4A16_CHANNEL = 0
};

/* Scheme w4a8. GROUPS: sum of its group sizes; CHANNEL: 1 if it may have one scale per output. */
enum {
    MBQ_SCHEME_W4A8 = 3,
    MBQ_W4A8_BITS = 4,
    MBQ_W4A8_ACT_BITS = 8,
    MBQ_W4A8_SYMMETRIC = 1,
    MBQ_W4A8_GROUPS = 128,
    MBQ_W4A8_CHANNEL = 1,
    MBQ_W4A8_LARGEST_K = 132104
};

#endif
