// The C ABI: refuse what is wrong, choose, lay out the workspace, launch.
#include <cstdint>

#include "families.h"
#include "mbq/select.h"

namespace mbq {
namespace {

bool misaligned(const void *pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 != 0; }

int weight_pointer_refusal(const MbqLinear &l) {
    const bool zeros = l.scheme != MBQ_W4A8;
    if (l.codes == nullptr || l.scales == nullptr || (zeros && l.zeros == nullptr)) return MBQ_E_NULL;
    for (const void *each : {l.codes, l.scales, l.zeros, l.bias, l.residual})
        if (misaligned(each)) return MBQ_E_ALIGN;
    return MBQ_OK;
}

int shift_of(int32_t group) { return group == 32 ? 5 : group == 64 ? 6 : group == 128 ? 7 : 0; }

LinearParams weight_params(const MbqLinear &l) {
    LinearParams p{};
    p.codes = static_cast<const uint8_t *>(l.codes);
    p.scales = static_cast<const uint8_t *>(l.scales);
    p.zeros = static_cast<const uint8_t *>(l.zeros);
    p.bias = static_cast<const uint16_t *>(l.bias);
    p.residual = static_cast<const uint16_t *>(l.residual);
    p.n = l.n;
    p.k = l.k;
    p.n_tiles = n_tiles_of(l);
    p.k_tiles = k_tiles_of(l);
    p.groups = l.group == 0 ? 0 : MBQ_TILE_COLUMNS / l.group * p.k_tiles;
    p.group_shift = shift_of(l.group);
    p.epilogue = l.epilogue;
    p.columns = l.epilogue == MBQ_EPILOGUE_SILU_MUL ? l.n / 2 : l.n;
    return p;
}

int dispatch(uint32_t scheme, const LinearParams &p, uint32_t dtype, const MbqConfig &config, CUstream_st *stream) {
    const bool skinny = config.family == kSkinnyFamily;
    LaunchLinear *const w3 = skinny ? launch_skinny_w3a16 : launch_gemm_w3a16;
    LaunchLinear *const w4 = skinny ? launch_skinny_w4a16 : launch_gemm_w4a16;
    LaunchLinear *const w4a8 = skinny ? launch_skinny_w4a8 : launch_gemm_w4a8;
    return (scheme == MBQ_W3A16 ? w3 : scheme == MBQ_W4A16 ? w4 : w4a8)(p, dtype, config, stream);
}

// Arguments are checked; `workspace` is as large as `place` says.
int run(const MbqLinear &l, LinearParams p, const MbqConfig &config, const Workspace &place, uint8_t *workspace,
        CUstream_st *stream) {
    p.splits = config.splits;
    if (l.scheme == MBQ_W4A8) {
        auto *const x_scales = reinterpret_cast<float *>(workspace + place.x_scales);
        const QuantActParams act{reinterpret_cast<const uint16_t *>(p.x), workspace, x_scales, p.m, p.k, p.k_tiles};
        const int error = launch_quant_act(act, l.dtype, stream);
        if (error != 0) return error;
        p.x = workspace;
        p.x_scales = x_scales;
    }
    if (config.splits > 1) {
        p.partials = reinterpret_cast<uint32_t *>(workspace + place.partials);
        p.tickets = reinterpret_cast<uint32_t *>(workspace + place.tickets);
#if !defined(MBQ_MUTANT) || MBQ_MUTANT != 9
        // Scratch of the caller: nothing in it survives from call to call, nor starts at zero.
        const int error = zero_async(p.tickets, place.bytes - place.tickets, stream);
        if (error != 0) return error;
#endif
    }
    return dispatch(l.scheme, p, l.dtype, config, stream);
}

// config_id < 0: choose.
int checked_linear(const MbqLinear *linear, int m, const void *x, void *y, void *workspace, size_t workspace_bytes,
                   CUstream_st *stream, int config_id) {
    int refused = problem_refusal(linear, m);
    if (refused == MBQ_OK) refused = weight_pointer_refusal(*linear);
    if (refused != MBQ_OK) return refused;
    if (m == 0) return MBQ_OK;
    if (x == nullptr || y == nullptr) return MBQ_E_NULL;
    if (misaligned(x) || misaligned(y) || misaligned(workspace)) return MBQ_E_ALIGN;

    MbqDevice device{};
    const int error = current_device(&device);
    if (error != 0) return error;
    const int id = config_id < 0 ? choose(linear, m, device) : config_id;
    MbqConfig config;
    if (!find_config(id, &config)) return id < 0 ? id : MBQ_E_CONFIG;
    refused = config_refusal(*linear, m, config, device);
    if (refused != MBQ_OK) return refused;
    const Workspace place = workspace_for(*linear, m, config);
    if (workspace_bytes < place.bytes || (place.bytes > 0 && workspace == nullptr)) return MBQ_E_WORKSPACE;

    LinearParams p = weight_params(*linear);
    p.x = static_cast<const uint8_t *>(x);
    p.y = static_cast<uint16_t *>(y);
    p.m = m;
    return run(*linear, p, config, place, static_cast<uint8_t *>(workspace), stream);
}

}  // namespace
}  // namespace mbq

using namespace mbq;

extern "C" {

int mbq_abi(void) { return MBQ_ABI; }

const char *mbq_status(int status) {
    switch (status) {
        case MBQ_OK: return "done";
        case MBQ_E_STRUCT: return "the descriptor is null or of a size this library does not know";
        case MBQ_E_SCHEME: return "the scheme is none of W3A16, W4A16, W4A8";
        case MBQ_E_LAYOUT: return "the tiles have another layout version than this library reads";
        case MBQ_E_DTYPE: return "the dtype is neither F16 nor BF16";
        case MBQ_E_SHAPE: return "n, k and M must be positive, k a multiple of 8 and below the scheme's limit, n a multiple of 32 with SILU_MUL";
        case MBQ_E_GROUP: return "the group size is not one of the scheme's, or does not divide k";
        case MBQ_E_NULL: return "a pointer that the call needs is null";
        case MBQ_E_ALIGN: return "a pointer is not a multiple of 16 bytes";
        case MBQ_E_WORKSPACE: return "the workspace is smaller than mbq_linear_workspace says";
        case MBQ_E_CONFIG: return "the config is unknown, or not for this problem on this device";
        case MBQ_E_EPILOGUE: return "the epilogue is unknown, or a flag is set";
        case MBQ_E_NO_IMAGE: return "the device is older than sm_80";
        default: return status > 0 ? cuda_error_text(status) : "unknown status";
    }
}

int mbq_linear(const MbqLinear *linear, int m, const void *x, void *y, void *workspace, size_t workspace_bytes,
               CUstream_st *stream) {
    return checked_linear(linear, m, x, y, workspace, workspace_bytes, stream, -1);
}

int mbq_linear_config(const MbqLinear *linear, int m, const void *x, void *y, void *workspace, size_t workspace_bytes,
                      CUstream_st *stream, int config) {
    if (config < 0) return MBQ_E_CONFIG;
    return checked_linear(linear, m, x, y, workspace, workspace_bytes, stream, config);
}

size_t mbq_linear_workspace(const MbqLinear *linear, int max_m) {
    return problem_refusal(linear, max_m) == MBQ_OK ? workspace_bytes(*linear, max_m) : 0;
}

int mbq_select_on(const MbqLinear *linear, int m, const MbqDevice *device) {
    if (device == nullptr) return MBQ_E_NULL;
    return choose(linear, m, *device);
}

int mbq_select(const MbqLinear *linear, int m, int sm) {
    MbqDevice device = nominal_device(sm).device;
    device.sm = sm;
    return choose(linear, m, device);
}

int mbq_config_count(void) { return kSkinnyCount + kGemmConfigCount; }

int mbq_config(int index, MbqConfig *out) {
    if (out == nullptr) return MBQ_E_NULL;
    return config_at(index, out) ? MBQ_OK : MBQ_E_CONFIG;
}

int mbq_config_legal(const MbqLinear *linear, int m, int config, const MbqDevice *device) {
    if (device == nullptr) return MBQ_E_NULL;
    const int refused = problem_refusal(linear, m);
    if (refused != MBQ_OK) return refused;
    MbqConfig found;
    return find_config(config, &found) ? config_refusal(*linear, m, found, *device) : MBQ_E_CONFIG;
}

int mbq_quant_act(int dtype, int m, int k, const void *x, int8_t *xq, float *sx, CUstream_st *stream) {
    if (dtype != MBQ_F16 && dtype != MBQ_BF16) return MBQ_E_DTYPE;
    if (m < 0 || m > kLargestSize || k <= 0 || k > MBQ_W4A8_LARGEST_K || k % MBQ_COLUMN_ALIGNMENT != 0) return MBQ_E_SHAPE;
    if (m == 0) return MBQ_OK;
    if (x == nullptr || xq == nullptr || sx == nullptr) return MBQ_E_NULL;
    if (misaligned(x) || misaligned(xq) || misaligned(sx)) return MBQ_E_ALIGN;
    const int k_tiles = static_cast<int>(ceil_div(k, MBQ_TILE_COLUMNS));
    const QuantActParams params{static_cast<const uint16_t *>(x), reinterpret_cast<uint8_t *>(xq), sx, m, k, k_tiles};
    return launch_quant_act(params, static_cast<uint32_t>(dtype), stream);
}

int mbq_dequant(const MbqLinear *linear, void *weights, CUstream_st *stream) {
    int refused = problem_refusal(linear, 0);
    if (refused == MBQ_OK) refused = weight_pointer_refusal(*linear);
    if (refused != MBQ_OK) return refused;
    if (weights == nullptr) return MBQ_E_NULL;
    if (misaligned(weights)) return MBQ_E_ALIGN;
    return launch_dequant(weight_params(*linear), linear->scheme, linear->dtype, static_cast<uint16_t *>(weights), stream);
}

int mbq_read_bw(const void *data, size_t bytes, uint32_t *sum, CUstream_st *stream) {
    if (data == nullptr || sum == nullptr) return MBQ_E_NULL;
    if (misaligned(data) || misaligned(sum)) return MBQ_E_ALIGN;
    if (bytes == 0 || bytes % 16 != 0) return MBQ_E_SHAPE;
    return launch_read_bw(data, bytes, sum, stream);
}

}  // extern "C"
