// Every instruction that plain C++ has no word for, each with two bodies: the device's and the emulation's.
//
// Kernels use these functions and nothing else of the device: no asm, no intrinsic, no CUDA type. So the same
// sources run thread by thread on a CPU (emulation/simt.h), where races, missing waits and stray accesses are errors.
// A `Site` names the caller in such an error; on a device it is empty and costs nothing.
//
// Fragments of a warp (PTX ISA, "Matrix fragments for mma"): lane = 4 * g + t.
//   m16n8k16 (16 bit)  A: a0 = row g, a1 = row g + 8, columns 2t, 2t+1; a2, a3 the same, columns + 8
//                      B: b0 = rows 2t, 2t+1 of column g; b1 = rows + 8
//   m16n8k32 (int8)    A: columns 4t .. 4t+3; a2, a3 columns + 16.   B: rows 4t .. 4t+3; b1 = rows + 16
//   both               C: c0, c1 = row g, columns 2t, 2t+1; c2, c3 = row g + 8
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "mbq/mbq.h"

#if defined(MBQ_EMULATION)
#include "simt.h"
#define MBQ_FN inline
#define MBQ_CONSTEXPR constexpr
#define MBQ_HOST_FN inline
#define MBQ_KERNEL inline void
#define MBQ_BOUNDS(threads, blocks)
#define MBQ_UNROLL
#else
#include <cuda_runtime.h>
#define MBQ_FN __device__ __forceinline__
#define MBQ_CONSTEXPR constexpr __host__ __device__
#define MBQ_HOST_FN inline
#define MBQ_KERNEL __global__ void
#define MBQ_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define MBQ_UNROLL _Pragma("unroll")
#endif

namespace mbq {

struct alignas(8) Words2 {
    uint32_t x, y;
};
struct alignas(16) Words4 {
    uint32_t x, y, z, w;
};

#if defined(MBQ_EMULATION)
using simt::Site;
#define MBQ_SITE simt::Site::here()
#else
struct Site {};
#define MBQ_SITE \
    Site {}
#endif

// ---- where a thread is -----------------------------------------------------------------------------------

MBQ_FN int thread_index() {
#if defined(MBQ_EMULATION)
    return simt::thread_index();
#else
    return static_cast<int>(threadIdx.x);
#endif
}

MBQ_FN int block_threads() {
#if defined(MBQ_EMULATION)
    return simt::block_threads();
#else
    return static_cast<int>(blockDim.x);
#endif
}

MBQ_FN int block_x() {
#if defined(MBQ_EMULATION)
    return simt::block_x();
#else
    return static_cast<int>(blockIdx.x);
#endif
}

// block_x() read anew: a compiler recomputes what follows from it, where it would keep or spill registers otherwise.
MBQ_FN int block_x_again() {
#if defined(MBQ_EMULATION)
    return simt::block_x();
#else
    int v;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(v));
    return v;
#endif
}

MBQ_FN int block_y() {
#if defined(MBQ_EMULATION)
    return simt::block_y();
#else
    return static_cast<int>(blockIdx.y);
#endif
}

MBQ_FN int block_z() {
#if defined(MBQ_EMULATION)
    return simt::block_z();
#else
    return static_cast<int>(blockIdx.z);
#endif
}

MBQ_FN int grid_x() {
#if defined(MBQ_EMULATION)
    return simt::grid_x();
#else
    return static_cast<int>(gridDim.x);
#endif
}

MBQ_FN int lane_index() { return thread_index() & 31; }
MBQ_FN int warp_index() { return thread_index() >> 5; }

// The same address, computed here and now: without it the compiler derives addresses anew in every step of a loop.
MBQ_FN const uint8_t *settled(const uint8_t *address) {
#if !defined(MBQ_EMULATION)
    asm volatile("" : "+l"(address));
#endif
    return address;
}

// ---- global memory ---------------------------------------------------------------------------------------
// stream: read once, evict first. load: read-only data that is used again. coherent: written during this launch.

#if defined(MBQ_EMULATION)
#define MBQ_LOAD(name, type, emulated, ptx, outs)                          \
    MBQ_FN type name(const void *address, Site site = MBQ_SITE) {          \
        return simt::load<type>(address, simt::Access::emulated, site);    \
    }
#else
#define MBQ_LOAD(name, type, emulated, ptx, outs)                          \
    MBQ_FN type name(const void *address, Site = MBQ_SITE) {               \
        type v;                                                            \
        asm volatile(ptx outs : "l"(address));                             \
        return v;                                                          \
    }
#endif
#define MBQ_OUT1 " %0, [%1];" : "=r"(v)
#define MBQ_OUT2 " {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y)
#define MBQ_OUT4 " {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
MBQ_LOAD(load_stream16, Words4, read_only, "ld.global.cs.v4.u32", MBQ_OUT4)
MBQ_LOAD(load_stream8, Words2, read_only, "ld.global.cs.v2.u32", MBQ_OUT2)
MBQ_LOAD(load_stream4, uint32_t, read_only, "ld.global.cs.u32", MBQ_OUT1)
MBQ_LOAD(load16, Words4, read_only, "ld.global.nc.v4.u32", MBQ_OUT4)
MBQ_LOAD(load8, Words2, read_only, "ld.global.nc.v2.u32", MBQ_OUT2)
MBQ_LOAD(load4, uint32_t, read_only, "ld.global.nc.u32", MBQ_OUT1)
MBQ_LOAD(load_coherent4, uint32_t, coherent, "ld.global.cg.u32", MBQ_OUT1)
#undef MBQ_LOAD
#undef MBQ_OUT1
#undef MBQ_OUT2
#undef MBQ_OUT4

MBQ_FN uint16_t load2(const void *address, Site site = MBQ_SITE) {
#if defined(MBQ_EMULATION)
    return simt::load<uint16_t>(address, simt::Access::read_only, site);
#else
    (void)site;
    uint16_t v;
    asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(v) : "l"(address));
    return v;
#endif
}

MBQ_FN uint32_t load1(const void *address, Site site = MBQ_SITE) {
#if defined(MBQ_EMULATION)
    return simt::load<uint8_t>(address, simt::Access::read_only, site);
#else
    (void)site;
    uint32_t v;
    asm volatile("ld.global.nc.u8 %0, [%1];" : "=r"(v) : "l"(address));
    return v;
#endif
}

// T: uint16_t, uint32_t, float, Words2, Words4.
template <class T>
MBQ_FN void store(void *address, T value, Site site = MBQ_SITE) {
#if defined(MBQ_EMULATION)
    simt::store(address, value, site);
#else
    (void)site;
    *static_cast<T *>(address) = value;
#endif
}

// Wrapping addition; returns what was there before. Integers only: float atomics would depend on the order of arrival.
MBQ_FN uint32_t atomic_add(uint32_t *address, uint32_t value, Site site = MBQ_SITE) {
#if defined(MBQ_EMULATION)
    return simt::atomic_add(address, value, site);
#else
    (void)site;
    return atomicAdd(address, value);
#endif
}

// Writes before it are seen by other blocks before writes after it.
MBQ_FN void fence_device() {
#if defined(MBQ_EMULATION)
    simt::fence_device();
#else
    __threadfence();
#endif
}

// ---- shared memory: addresses are byte offsets of the block's dynamic shared memory ----------------------

MBQ_FN uint32_t shared_base() {
#if defined(MBQ_EMULATION)
    return 0;
#else
    extern __shared__ __align__(128) unsigned char mbq_shared[];
    return static_cast<uint32_t>(__cvta_generic_to_shared(mbq_shared));
#endif
}

MBQ_FN uint32_t lds4(uint32_t address, Site site = MBQ_SITE) {
#if defined(MBQ_EMULATION)
    return simt::shared_load<uint32_t>(address, site);
#else
    (void)site;
    uint32_t v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address));
    return v;
#endif
}

MBQ_FN Words2 lds8(uint32_t address, Site site = MBQ_SITE) {
#if defined(MBQ_EMULATION)
    return simt::shared_load<Words2>(address, site);
#else
    (void)site;
    Words2 v;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
    return v;
#endif
}

MBQ_FN Words4 lds16(uint32_t address, Site site = MBQ_SITE) {
#if defined(MBQ_EMULATION)
    return simt::shared_load<Words4>(address, site);
#else
    (void)site;
    Words4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address));
    return v;
#endif
}

MBQ_FN void sts4(uint32_t address, uint32_t v, Site site = MBQ_SITE) {
#if defined(MBQ_EMULATION)
    simt::shared_store(address, v, site);
#else
    (void)site;
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
#endif
}

MBQ_FN void sts16(uint32_t address, Words4 v, Site site = MBQ_SITE) {
#if defined(MBQ_EMULATION)
    simt::shared_store(address, v, site);
#else
    (void)site;
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
#endif
}

// Copy 16 bytes from global to shared memory in the background; zeros where not `valid` (nothing is read then).
MBQ_FN void cp_async16(uint32_t shared, const void *global, bool valid, Site site = MBQ_SITE) {
#if defined(MBQ_EMULATION)
    simt::cp_async16(shared, global, valid, site);
#else
    (void)site;
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
#endif
}

// The same for 8 bytes.
MBQ_FN void cp_async8(uint32_t shared, const void *global, bool valid, Site site = MBQ_SITE) {
#if defined(MBQ_EMULATION)
    simt::cp_async8(shared, global, valid, site);
#else
    (void)site;
    const int bytes = valid ? 8 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
#endif
}

// Close a group of copies.
MBQ_FN void cp_async_commit(Site site = MBQ_SITE) {
#if defined(MBQ_EMULATION)
    simt::cp_async_commit(site);
#else
    (void)site;
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Wait until at most `pending` of this thread's newest groups are still under way. Others' copies need a barrier too.
template <int pending>
MBQ_FN void cp_async_wait(Site site = MBQ_SITE) {
#if defined(MBQ_EMULATION)
    simt::cp_async_wait(pending, site);
#else
    (void)site;
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

// ---- meeting points --------------------------------------------------------------------------------------

MBQ_FN void block_barrier(Site site = MBQ_SITE) {
#if defined(MBQ_EMULATION)
    simt::block_barrier(site);
#else
    (void)site;
    __syncthreads();
#endif
}

MBQ_FN void warp_barrier(Site site = MBQ_SITE) {
#if defined(MBQ_EMULATION)
    simt::warp_barrier(site);
#else
    (void)site;
    __syncwarp();
#endif
}

// The value of lane (lane ^ mask).
MBQ_FN uint32_t shuffle_xor(uint32_t value, int mask, Site site = MBQ_SITE) {
#if defined(MBQ_EMULATION)
    return simt::shuffle_xor(value, mask, site);
#else
    (void)site;
    return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
#endif
}

// Four 8x8 matrices of 16-bit elements; lane i gives the address of row i mod 8 of matrix i div 8.
MBQ_FN Words4 ldmatrix4(uint32_t address, Site site = MBQ_SITE) {
#if defined(MBQ_EMULATION)
    return simt::ldmatrix4(address, site);
#else
    (void)site;
    Words4 v;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address));
    return v;
#endif
}

// c += a b, fp16 or bf16 factors, fp32 sums. Sums of zero cost nothing: c is an operand of its own.
MBQ_FN void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site = MBQ_SITE) {
#if defined(MBQ_EMULATION)
    simt::mma_f16(c, a, b0, b1, site);
#else
    (void)site;
    float d0, d1, d2, d3;
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(d0), "=f"(d1), "=f"(d2), "=f"(d3)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
    c[0] = d0, c[1] = d1, c[2] = d2, c[3] = d3;
#endif
}

MBQ_FN void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site = MBQ_SITE) {
#if defined(MBQ_EMULATION)
    simt::mma_bf16(c, a, b0, b1, site);
#else
    (void)site;
    float d0, d1, d2, d3;
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(d0), "=f"(d1), "=f"(d2), "=f"(d3)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
    c[0] = d0, c[1] = d1, c[2] = d2, c[3] = d3;
#endif
}

// c += a b, int8 factors, int32 sums (wrapping).
MBQ_FN void mma_s8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site = MBQ_SITE) {
#if defined(MBQ_EMULATION)
    simt::mma_s8(c, a, b0, b1, site);
#else
    (void)site;
    int32_t d0, d1, d2, d3;
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=r"(d0), "=r"(d1), "=r"(d2), "=r"(d3)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
    c[0] = d0, c[1] = d1, c[2] = d2, c[3] = d3;
#endif
}

// ---- arithmetic ------------------------------------------------------------------------------------------
// Pairs of 16-bit numbers travel in one word, the first in the low half. One rounding per operation, to nearest even.

// (a & mask) | bits in one instruction: with both constants in registers the compiler would not merge two immediates.
MBQ_FN uint32_t and_or(uint32_t a, uint32_t mask, uint32_t bits) {
#if defined(MBQ_EMULATION)
    return (a & mask) | bits;
#else
    uint32_t v;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(v) : "r"(a), "r"(mask), "r"(bits));
    return v;
#endif
}

// Products and sums in fp32 that no compiler may contract or reorder.
MBQ_FN float mul_rn(float a, float b) {
#if defined(MBQ_EMULATION)
    return simt::mul_rn(a, b);
#else
    return __fmul_rn(a, b);
#endif
}

MBQ_FN float add_rn(float a, float b) {
#if defined(MBQ_EMULATION)
    return simt::add_rn(a, b);
#else
    return __fadd_rn(a, b);
#endif
}

MBQ_FN float fma_rn(float a, float b, float c) {
#if defined(MBQ_EMULATION)
    return simt::fma_rn(a, b, c);
#else
    return __fmaf_rn(a, b, c);
#endif
}

MBQ_FN float div_rn(float a, float b) {
#if defined(MBQ_EMULATION)
    return simt::div_rn(a, b);
#else
    return __fdiv_rn(a, b);
#endif
}

MBQ_FN float to_float(int32_t a) {
#if defined(MBQ_EMULATION)
    return static_cast<float>(a);
#else
    return __int2float_rn(a);
#endif
}

// Round half to even.
MBQ_FN int rint_to_int(float a) {
#if defined(MBQ_EMULATION)
    return simt::rint_to_int(a);
#else
    return __float2int_rn(a);
#endif
}

// Within 2 ulp of the exponential on a device, exact to rounding in the emulation.
MBQ_FN float exponential(float a) {
#if defined(MBQ_EMULATION)
    return simt::exponential(a);
#else
    return expf(a);
#endif
}

MBQ_FN float float_of_bits(uint32_t bits) {
#if defined(MBQ_EMULATION)
    return simt::bit_cast<float>(bits);
#else
    return __uint_as_float(bits);
#endif
}

MBQ_FN uint32_t bits_of_float(float a) {
#if defined(MBQ_EMULATION)
    return simt::bit_cast<uint32_t>(a);
#else
    return __float_as_uint(a);
#endif
}

// fp16.
struct F16 {
    static constexpr uint32_t kDtype = MBQ_F16;

    static MBQ_FN float to_float(uint32_t low_half) {
#if defined(MBQ_EMULATION)
        return simt::f16_to_float(low_half);
#else
        float v;
        asm("{ .reg .b16 h, unused; mov.b32 {h, unused}, %1; cvt.f32.f16 %0, h; }" : "=f"(v) : "r"(low_half));
        return v;
#endif
    }
    static MBQ_FN uint16_t from_float(float a) {
#if defined(MBQ_EMULATION)
        return simt::f16_from_float(a);
#else
        uint16_t v;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(v) : "f"(a));
        return v;
#endif
    }
    static MBQ_FN uint32_t add2(uint32_t a, uint32_t b) {
#if defined(MBQ_EMULATION)
        return simt::f16_add2(a, b);
#else
        uint32_t v;
        asm("add.rn.f16x2 %0, %1, %2;" : "=r"(v) : "r"(a), "r"(b));
        return v;
#endif
    }
    static MBQ_FN uint32_t mul2(uint32_t a, uint32_t b) {
#if defined(MBQ_EMULATION)
        return simt::f16_mul2(a, b);
#else
        uint32_t v;
        asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(v) : "r"(a), "r"(b));
        return v;
#endif
    }
    static MBQ_FN uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
#if defined(MBQ_EMULATION)
        return simt::f16_fma2(a, b, c);
#else
        uint32_t v;
        asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(v) : "r"(a), "r"(b), "r"(c));
        return v;
#endif
    }
    static MBQ_FN void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site = MBQ_SITE) {
        mbq::mma_f16(c, a, b0, b1, site);
    }
};

// bf16. Before sm_90 there is no addition or product of pairs, only the fused form, which is exact here as well.
struct BF16 {
    static constexpr uint32_t kDtype = MBQ_BF16;

    static MBQ_FN float to_float(uint32_t low_half) { return float_of_bits(low_half << 16); }
    static MBQ_FN uint16_t from_float(float a) {
#if defined(MBQ_EMULATION)
        return simt::bf16_from_float(a);
#else
        uint16_t v;
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(v) : "f"(a));
        return v;
#endif
    }
    static MBQ_FN uint32_t add2(uint32_t a, uint32_t b) { return fma2(a, 0x3F803F80u, b); }       // a * 1 + b
    static MBQ_FN uint32_t mul2(uint32_t a, uint32_t b) { return fma2(a, b, 0x80008000u); }       // a * b - 0
    static MBQ_FN uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
#if defined(MBQ_EMULATION)
        return simt::bf16_fma2(a, b, c);
#else
        uint32_t v;
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(v) : "r"(a), "r"(b), "r"(c));
        return v;
#endif
    }
    static MBQ_FN void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site = MBQ_SITE) {
        mbq::mma_bf16(c, a, b0, b1, site);
    }
};

// ---- launching -------------------------------------------------------------------------------------------

struct Grid {
    int x = 1, y = 1, z = 1;
};

// Start a kernel that takes one argument by value; returns a cudaError_t.
template <class Params>
MBQ_HOST_FN int launch(void (*kernel)(Params), Grid grid, int threads, size_t shared_bytes, CUstream_st *stream,
                       const Params &params) {
#if defined(MBQ_EMULATION)
    (void)stream;
    return simt::launch(grid.x, grid.y, grid.z, threads, shared_bytes, [&] { kernel(params); });
#else
    if (shared_bytes > 48 * 1024) {
        const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                       static_cast<int>(shared_bytes));
        if (error != cudaSuccess) return error;
    }
    const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
    kernel<<<blocks, static_cast<unsigned>(threads), shared_bytes, stream>>>(params);
    return cudaGetLastError();
#endif
}

// Fill with zero bytes, in order with the stream's launches; returns a cudaError_t.
MBQ_HOST_FN int zero_async(void *address, size_t bytes, CUstream_st *stream) {
#if defined(MBQ_EMULATION)
    (void)stream;
    return simt::zero(address, bytes);
#else
    return cudaMemsetAsync(address, 0, bytes, stream);
#endif
}

// What the current device is; returns a cudaError_t (35 without a driver).
MBQ_HOST_FN int current_device(MbqDevice *device) {
#if defined(MBQ_EMULATION)
    *device = simt::device();
    return 0;
#else
    int id = 0, major = 0, minor = 0;
    cudaError_t error = cudaGetDevice(&id);
    const auto ask = [&](int *value, cudaDeviceAttr attribute) {
        if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, id);
    };
    ask(&major, cudaDevAttrComputeCapabilityMajor);
    ask(&minor, cudaDevAttrComputeCapabilityMinor);
    ask(&device->sm_count, cudaDevAttrMultiProcessorCount);
    ask(&device->smem_optin, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    ask(&device->l2_bytes, cudaDevAttrL2CacheSize);
    device->sm = 10 * major + minor;
    return error;
#endif
}

MBQ_HOST_FN const char *cuda_error_text(int error) {
#if defined(MBQ_EMULATION)
    return simt::error_text(error);
#else
    return cudaGetErrorString(static_cast<cudaError_t>(error));
#endif
}

}  // namespace mbq
