#include "families.h"
#include "mbq/gemm.cuh"

namespace mbq {

template <class T>
static int launch_dtype(const LinearParams &params, const MbqConfig &config, CUstream_st *stream) {
    if (params.groups == 0) return launch_gemm<gemm::Int8<T, false>>(params, config, stream);
    return launch_gemm<gemm::Int8<T, true>>(params, config, stream);
}

int launch_gemm_w4a8(const LinearParams &params, uint32_t dtype, const MbqConfig &config, CUstream_st *stream) {
    return dtype == MBQ_F16 ? launch_dtype<F16>(params, config, stream) : launch_dtype<BF16>(params, config, stream);
}

}  // namespace mbq
