#include "families.h"
#include "mbq/skinny.cuh"

namespace mbq {

template <class T>
static int launch_dtype(const LinearParams &params, const MbqConfig &config, CUstream_st *stream) {
    if (params.group_shift == 7) return launch_skinny<WeightOnly<W4, T, 1>>(params, config, stream);
    if (params.group_shift == 6) return launch_skinny<WeightOnly<W4, T, 2>>(params, config, stream);
    return launch_skinny<WeightOnly<W4, T, 4>>(params, config, stream);
}

int launch_skinny_w4a16(const LinearParams &params, uint32_t dtype, const MbqConfig &config, CUstream_st *stream) {
    return dtype == MBQ_F16 ? launch_dtype<F16>(params, config, stream) : launch_dtype<BF16>(params, config, stream);
}

}  // namespace mbq
