// What each translation unit of device code offers to the dispatch in launch.cu.
#pragma once

#include "mbq/act_quant.cuh"
#include "mbq/linear.cuh"

namespace mbq {

// Each returns 0, a cudaError_t, or MBQ_E_CONFIG if the config is not among its instances.
// `params.k_tiles`, `groups` and `splits` are filled in and checked; tickets are zeroed by the caller.
using LaunchLinear = int(const LinearParams &params, uint32_t dtype, const MbqConfig &config, CUstream_st *stream);

LaunchLinear launch_skinny_w3a16, launch_skinny_w4a16, launch_skinny_w4a8;
LaunchLinear launch_gemm_w3a16, launch_gemm_w4a16, launch_gemm_w4a8;

int launch_quant_act(const QuantActParams &params, uint32_t dtype, CUstream_st *stream);

// Row-major weights [n, k], one rounding each. Uses only the weight fields of `params`.
int launch_dequant(const LinearParams &params, uint32_t scheme, uint32_t dtype, uint16_t *weights, CUstream_st *stream);

// *sum = wrapping sum of the words of `data`; `bytes` is a multiple of 16. Zeroes *sum first.
int launch_read_bw(const void *data, size_t bytes, uint32_t *sum, CUstream_st *stream);

}  // namespace mbq
