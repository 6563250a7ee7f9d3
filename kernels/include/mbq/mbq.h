/*
 * C ABI of the kernel library: fused low-bit linears y = x W^T (+ bias, + residual).
 *
 * Plain C99. No allocation, no synchronization, no state kept between calls, no exceptions; safe from several
 * threads; every launch can be captured in a CUDA graph. A call that returns a negative status wrote nothing.
 *
 * Letters: N output features, K input features, M rows of activations, G columns that share a scale.
 */
#ifndef MBQ_H
#define MBQ_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define MBQ_ABI 1

#if defined(_WIN32)
#define MBQ_API __declspec(dllexport)
#else
#define MBQ_API __attribute__((visibility("default")))
#endif

struct CUstream_st; /* *cudaStream_t, so that no CUDA header is needed here */

/* Number formats; `MBQ_W8A8` and `MBQ_W8A16` are reserved and answered with MBQ_E_SCHEME. */
enum { MBQ_W3A16 = 1, MBQ_W4A16 = 2, MBQ_W4A8 = 3, MBQ_W8A8 = 4, MBQ_W8A16 = 5 };

/* Type of x, y, bias and residual. */
enum { MBQ_F16 = 1, MBQ_BF16 = 2 };

/* SILU_MUL: rows of gate and up are interleaved by 16, y has n/2 columns: silu(gate) * up. */
enum { MBQ_EPILOGUE_NONE = 0, MBQ_EPILOGUE_SILU_MUL = 1 };

/* Status: 0 done; > 0 a cudaError_t; < 0 the argument that was refused. */
enum {
    MBQ_OK = 0,
    MBQ_E_STRUCT = -1,    /* null descriptor, or a struct_size this library does not know */
    MBQ_E_SCHEME = -2,    /* unknown or unsupported number format */
    MBQ_E_LAYOUT = -3,    /* another layout version than MBQ_LAYOUT_VERSION of layout.h */
    MBQ_E_DTYPE = -4,     /* neither MBQ_F16 nor MBQ_BF16 */
    MBQ_E_SHAPE = -5,     /* n, k or M not positive (M may be 0), k % 8 != 0, k too large, or an epilogue that n forbids */
    MBQ_E_GROUP = -6,     /* group size the scheme has not, or that does not divide k */
    MBQ_E_NULL = -7,      /* a pointer that the scheme needs is null */
    MBQ_E_ALIGN = -8,     /* a pointer is not 16-byte aligned */
    MBQ_E_WORKSPACE = -9, /* workspace smaller than mbq_linear_workspace says */
    MBQ_E_CONFIG = -10,   /* config id unknown, or illegal for this problem */
    MBQ_E_EPILOGUE = -11, /* unknown epilogue or flag */
    MBQ_E_NO_IMAGE = -12  /* the device is older than sm_80 */
};

typedef struct MbqLinear {
    uint32_t struct_size;    /* sizeof(MbqLinear) at the caller; the struct only grows at its end */
    uint32_t scheme;         /* MBQ_W3A16 ... */
    uint32_t layout_version; /* of the scheme's tile layout */
    uint32_t dtype;          /* MBQ_F16 or MBQ_BF16 */
    uint32_t epilogue;       /* MBQ_EPILOGUE_... */
    uint32_t flags;          /* 0; other bits are refused */
    int32_t n, k;            /* logical sizes, not padded */
    int32_t group;           /* 32, 64, 128; 0 = one scale per output channel */
    const void *codes;       /* device, tile layout of the scheme */
    const void *scales;      /* fp16 [N/16, K/G, 8, 2], or fp32 [16*ceil(n/16)] per channel */
    const void *zeros;       /* words [N/16, K/G, 2]; NULL for symmetric schemes */
    const void *bias;        /* dtype [n], or NULL */
    const void *residual;    /* dtype [M, n] (n/2 with SILU_MUL), added before rounding, or NULL */
} MbqLinear;

typedef struct MbqDevice {
    int32_t sm;         /* 10 * major + minor: 90 for an H100 */
    int32_t sm_count;   /* streaming multiprocessors */
    int32_t smem_optin; /* bytes of shared memory one block may have */
    int32_t l2_bytes;
} MbqDevice;

/* What a config id stands for, for tuners and reports. */
typedef struct MbqConfig {
    int32_t id;
    int32_t family;     /* 1 skinny, 2 gemm */
    int32_t n_tiles;    /* tiles of 16 rows per block */
    int32_t warps;      /* per block */
    int32_t depth;      /* skinny: tiles prefetched; gemm: stages */
    int32_t rows;       /* rows of activations per block */
    int32_t splits;     /* parts of K on different blocks */
} MbqConfig;

MBQ_API int mbq_abi(void);

/* Static text for a status of this library; for a cudaError_t the runtime's own text. */
MBQ_API const char *mbq_status(int status);

/* y = x W^T with the config that mbq_select_on picks for the current device. x is row-major [M, k]. */
MBQ_API int mbq_linear(const MbqLinear *linear, int m, const void *x, void *y, void *workspace,
                       size_t workspace_bytes, struct CUstream_st *stream);

/* The same with a config of the caller's choice; refuses one that is illegal for the problem. */
MBQ_API int mbq_linear_config(const MbqLinear *linear, int m, const void *x, void *y, void *workspace,
                              size_t workspace_bytes, struct CUstream_st *stream, int config);

/* Bytes of scratch that suffice for every m <= max_m under every legal config. 0 for a bad descriptor. */
MBQ_API size_t mbq_linear_workspace(const MbqLinear *linear, int max_m);

/* Config id for the nominal device of an SM, or for a given device. Pure host functions: no driver is called. */
MBQ_API int mbq_select(const MbqLinear *linear, int m, int sm);
MBQ_API int mbq_select_on(const MbqLinear *linear, int m, const MbqDevice *device);

/* Number of configs, what the one at an index is, and whether the one of an id may run a problem (MBQ_OK or why not). */
MBQ_API int mbq_config(int index, MbqConfig *out);
MBQ_API int mbq_config_count(void);
MBQ_API int mbq_config_legal(const MbqLinear *linear, int m, int config, const MbqDevice *device);

/* Per-token int8: sx = max(absmax, 1e-5) / 127, xq = rint(x / sx), four columns stored in order 0 2 1 3.
 * xq is [M, 128 * ceil(k / 128)], padded with zeros; sx is fp32 [M]. */
MBQ_API int mbq_quant_act(int dtype, int m, int k, const void *x, int8_t *xq, float *sx,
                          struct CUstream_st *stream);

/* Row-major weights [n, k] in linear->dtype, each (u - z) * s rounded once. */
MBQ_API int mbq_dequant(const MbqLinear *linear, void *weights, struct CUstream_st *stream);

/* Read `bytes` (a multiple of 16) once; *sum becomes the wrapping sum of their 32-bit words. The ceiling that
 * every other kernel is measured against. */
MBQ_API int mbq_read_bw(const void *data, size_t bytes, uint32_t *sum, struct CUstream_st *stream);

#ifdef __cplusplus
}
#endif
#endif
