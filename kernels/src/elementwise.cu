#include "families.h"
#include "mbq/act_quant.cuh"
#include "mbq/dequant_rows.cuh"
#include "mbq/read_bw.cuh"

namespace mbq {

int launch_quant_act(const QuantActParams &params, uint32_t dtype, CUstream_st *stream) {
    return dtype == MBQ_F16 ? quant_act<F16>(params, stream) : quant_act<BF16>(params, stream);
}

template <class T>
static int dequant_scheme(const DequantRowsParams &params, uint32_t scheme, CUstream_st *stream) {
    using namespace dequant_rows;
    if (scheme == MBQ_W3A16) return dequantize_rows<Float<W3, T>, W3::kTileBytes>(params, stream);
    if (scheme == MBQ_W4A16) return dequantize_rows<Float<W4, T>, W4::kTileBytes>(params, stream);
    return dequantize_rows<Int8<T>, W4::kTileBytes>(params, stream);
}

int launch_dequant(const LinearParams &params, uint32_t scheme, uint32_t dtype, uint16_t *weights,
                   CUstream_st *stream) {
    const DequantRowsParams rows{params, weights};
    return dtype == MBQ_F16 ? dequant_scheme<F16>(rows, scheme, stream) : dequant_scheme<BF16>(rows, scheme, stream);
}

int launch_read_bw(const void *data, size_t bytes, uint32_t *sum, CUstream_st *stream) {
    const int error = zero_async(sum, sizeof *sum, stream);
    if (error != 0 || bytes == 0) return error;
    return launch_read_bw_kernel({static_cast<const uint8_t *>(data), bytes / 16, sum}, stream);
}

}  // namespace mbq
