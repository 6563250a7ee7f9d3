#include "families.h"
#include "mbq/gemm.cuh"

namespace mbq {

int launch_gemm_w3a16(const LinearParams &params, uint32_t dtype, const MbqConfig &config, CUstream_st *stream) {
    if (dtype == MBQ_F16) return launch_gemm<gemm::Float<W3, F16, MBQ_W3A16>>(params, config, stream);
    return launch_gemm<gemm::Float<W3, BF16, MBQ_W3A16>>(params, config, stream);
}

}  // namespace mbq
