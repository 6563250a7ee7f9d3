// Which config runs a problem, whether it may, and how much scratch that takes. Pure host C++17: no CUDA, no state.
//
// A measured row of tuning.inc wins; without one a start rule made of arithmetic decides, the same on every machine.
#pragma once

#include <cstddef>
#include <cstdint>

#include "mbq/gemm_configs.h"
#include "mbq/layout.h"
#include "mbq/mbq.h"
#include "mbq/skinny_configs.h"

namespace mbq {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int32_t n_tiles_of(const MbqLinear &linear) { return static_cast<int32_t>(ceil_div(linear.n, MBQ_TILE_ROWS)); }
constexpr int32_t groups_per_tile(const MbqLinear &linear) { return linear.group > 0 ? MBQ_TILE_COLUMNS / linear.group : 0; }
constexpr int32_t k_tiles_of(const MbqLinear &linear) { return static_cast<int32_t>(ceil_div(linear.k, MBQ_TILE_COLUMNS)); }

// ---- all configs: skinny, then gemm ----------------------------------------------------------------------------

inline bool config_at(int index, MbqConfig *out) {
    if (index < 0 || index >= kSkinnyCount + kGemmConfigCount) return false;
    *out = index < kSkinnyCount ? skinny_config(index) : kGemmConfigs[index - kSkinnyCount];
    return true;
}

inline bool find_config(int id, MbqConfig *out) {
    for (int i = 0; config_at(i, out); ++i)
        if (out->id == id) return true;
    return false;
}

// ---- what is refused ----------------------------------------------------------------------------------------

constexpr int32_t kLargestSize = 1 << 27;     // rows, columns, tokens: products stay within 64 bits, tiles within 32
constexpr size_t kLargestPartials = 16u << 20; // scratch for parts of K; more never pays
constexpr int kLargestSplitRows = 512;         // nor does splitting K for more tokens

// Group sizes are powers of two, and layout.h gives a scheme's as one sum of them.
inline int group_refusal(const MbqLinear &l) {
    constexpr int kSizes[] = {0, MBQ_W3A16_GROUPS, MBQ_W4A16_GROUPS, MBQ_W4A8_GROUPS};
    const int sizes = kSizes[l.scheme]; // the scheme is known by now
    const bool channel = l.scheme == MBQ_W4A8 && MBQ_W4A8_CHANNEL;
    if (l.group == 0) return channel ? MBQ_OK : MBQ_E_GROUP;
    const bool power_of_two = l.group > 0 && (l.group & (l.group - 1)) == 0;
    return power_of_two && (sizes & l.group) != 0 && l.k % l.group == 0 ? MBQ_OK : MBQ_E_GROUP;
}

// Everything of a problem but its pointers.
inline int problem_refusal(const MbqLinear *linear, int m) {
    if (linear == nullptr || linear->struct_size != sizeof(MbqLinear)) return MBQ_E_STRUCT;
    const MbqLinear &l = *linear;
    if (l.scheme < MBQ_W3A16 || l.scheme > MBQ_W4A8) return MBQ_E_SCHEME;
    if (l.layout_version != MBQ_LAYOUT_VERSION) return MBQ_E_LAYOUT;
    if (l.dtype != MBQ_F16 && l.dtype != MBQ_BF16) return MBQ_E_DTYPE;
    if (l.epilogue > MBQ_EPILOGUE_SILU_MUL || l.flags != 0) return MBQ_E_EPILOGUE;
    if (l.n <= 0 || l.k <= 0 || m < 0 || l.k % MBQ_COLUMN_ALIGNMENT != 0) return MBQ_E_SHAPE;
    if (l.n > kLargestSize || l.k > kLargestSize || m > kLargestSize) return MBQ_E_SHAPE;
    if (l.scheme == MBQ_W4A8 && l.k > MBQ_W4A8_LARGEST_K) return MBQ_E_SHAPE;
    if (l.epilogue == MBQ_EPILOGUE_SILU_MUL && l.n % 32 != 0) return MBQ_E_SHAPE;
    return group_refusal(l);
}

inline size_t partial_bytes(const MbqLinear &linear, int m, int splits) {
    return splits == 1 ? 0 : size_t{4} * static_cast<size_t>(splits) * static_cast<size_t>(m) * 16u *
                                 static_cast<size_t>(n_tiles_of(linear));
}

// Whether a config may run a problem on a device.
inline int config_refusal(const MbqLinear &linear, int m, const MbqConfig &config, const MbqDevice &device) {
    if (device.sm < 80) return MBQ_E_NO_IMAGE;
    if (linear.epilogue == MBQ_EPILOGUE_SILU_MUL && config.n_tiles % 2 != 0) return MBQ_E_CONFIG;
    if (config.splits > k_tiles_of(linear) || partial_bytes(linear, m, config.splits) > kLargestPartials)
        return MBQ_E_CONFIG;
    if (config.family == kSkinnyFamily) {
        return m > config.rows || config.warps > most_skinny_warps(config.n_tiles, groups_per_tile(linear)) ? MBQ_E_CONFIG : MBQ_OK;
    }
    if (config.splits > 1 && m > kLargestSplitRows) return MBQ_E_CONFIG;
    const size_t shared = gemm_shared_bytes(config, linear.scheme);
    return shared > static_cast<size_t>(device.smem_optin) ? MBQ_E_CONFIG : MBQ_OK;
}

// ---- which one ----------------------------------------------------------------------------------------------

// The GPU that stands for an SM number where no device is at hand, and bytes in flight it needs per SM (Little's law:
// about its GB/s per SM in KiB).
struct NominalDevice {
    MbqDevice device;
    int need_kib, threads_per_sm;
};
constexpr NominalDevice kNominal[] = {
    {{80, 108, 163 << 10, 40 << 20}, 18, 2048},  // A100
    {{86, 82, 99 << 10, 6 << 20}, 11, 1536},     // RTX 3090
    {{87, 16, 163 << 10, 4 << 20}, 10, 1536},    // Jetson AGX Orin
    {{89, 128, 99 << 10, 72 << 20}, 6, 1536},    // RTX 4090
    {{90, 132, 227 << 10, 50 << 20}, 24, 2048},  // H100
    {{100, 148, 227 << 10, 126 << 20}, 50, 2048}, // B200
    {{110, 20, 227 << 10, 32 << 20}, 14, 1536},  // Jetson Thor
    {{120, 170, 99 << 10, 96 << 20}, 10, 1536},  // RTX 5090
    {{121, 48, 99 << 10, 24 << 20}, 6, 1536},    // GB10
};

// The newest nominal device that is not newer than `sm`.
inline const NominalDevice &nominal_device(int sm) {
    const NominalDevice *found = &kNominal[0];
    for (const NominalDevice &each : kNominal)
        if (each.device.sm <= sm) found = &each;
    return *found;
}

struct TunedRow {
    uint32_t scheme, dtype;
    int32_t sm, n, k, m_first, m_last, config;
};
constexpr TunedRow kTuned[] = {
#include "mbq/tuning.inc"
    {0, 0, 0, 0, 0, 0, 0, 0}, // never matches; C++ has no empty array
};

// Do blocks fill whole waves of the device, to within a tenth?
inline bool fills_waves(int64_t blocks, int64_t sms) { return 10 * ceil_div(blocks, sms) * sms <= 11 * blocks; }

// Registers a thread takes, rounded to how they are handed out (kernels/budget.json has the exact numbers).
constexpr int skinny_registers(int n_tiles) { return n_tiles == 1 ? 120 : 144; }

inline int skinny_start_rule(const MbqLinear &l, const MbqDevice &device, const NominalDevice &nominal) {
    const bool gated = l.epilogue == MBQ_EPILOGUE_SILU_MUL;
    const int nt = l.n <= 8192 && !gated ? 1 : 2, depth = nt == 1 ? 2 : 1;
    const int64_t sms = device.sm_count, k_tiles = k_tiles_of(l), blocks = ceil_div(l.n, 16 * nt);
    int64_t splits = 1;
    // Below 64 KiB per SM the whole share is a few round trips to memory: splitting would only add a second pass.
    if (3 * static_cast<int64_t>(l.n) * l.k / 8 / sms >= 65536 && !fills_waves(blocks, sms))
        for (int64_t s = 4; s >= 2; s /= 2)
            if (fills_waves(blocks * s, sms) && k_tiles / s >= 8) splits = s;
    const int64_t per_part = ceil_div(k_tiles, splits);
    const auto resident = [&](int64_t warps) { // blocks that an SM holds at once
        const int64_t by_registers = 65536 / (skinny_registers(nt) * 32 * warps);
        const int64_t by_threads = nominal.threads_per_sm / (32 * warps);
        return by_registers < by_threads ? by_registers : by_threads;
    };
    // Shares of the warps: at least two tiles each; to within a tenth equal; all blocks at once rather than a few later.
    const auto able = [&](int64_t warps, int wishes) {
        const int64_t share = ceil_div(per_part, warps);
        if (share < 2 || warps > most_skinny_warps(nt, groups_per_tile(l))) return false;
        if (wishes >= 1 && 10 * share * warps > 11 * per_part) return false;
        return wishes < 2 || resident(warps) * sms >= blocks * splits;
    };
    int wishes = 2;
    const auto none = [&] {
        for (const int warps : kSkinnyWarps)
            if (able(warps, wishes)) return false;
        return true;
    };
    while (wishes > 0 && none()) --wishes;
    int chosen = 4;
    for (const int warps : kSkinnyWarps) {
        if (!able(warps, wishes)) continue;
        chosen = warps;
        const double offered = static_cast<double>(blocks * splits) / static_cast<double>(sms);
        const double held = static_cast<double>(resident(warps));
        if ((held < offered ? held : offered) * warps * nt * 768.0 * depth >= 1024.0 * nominal.need_kib) break;
    }
    return skinny_id(nt, depth, chosen, static_cast<int>(splits));
}

// Rows per block by the size of M, then the widest block that still gives every SM one, then parts of K until it does.
inline int gemm_start_rule(const MbqLinear &l, int m, const MbqDevice &device) {
    const int rows = m <= 16 ? 16 : m <= 32 ? 32 : m <= 128 ? 64 : 128;
    int best = MBQ_E_CONFIG;
    int64_t best_score = -1;
    for (const MbqConfig &config : kGemmConfigs) {
        if (config_refusal(l, m, config, device) != MBQ_OK) continue;
        const int64_t blocks = ceil_div(n_tiles_of(l), config.n_tiles) * ceil_div(m, config.rows) * config.splits;
        const bool busy = blocks >= device.sm_count;
        // Lexicographic: the wanted rows, a busy device, few parts, wide blocks.
        const int64_t miss = config.rows == rows ? 0 : config.rows < rows ? rows / config.rows : 2 * config.rows / rows;
        const int64_t score = (64 - miss) * 1000000 + (busy ? 500000 : blocks * 1000 / device.sm_count * 100) +
                              (busy ? (8 - config.splits) * 1000 + config.n_tiles : config.splits);
        if (score > best_score) best_score = score, best = config.id;
    }
    return best;
}

inline int start_rule(const MbqLinear &l, int m, const MbqDevice &device) {
    if (m <= 8) return skinny_start_rule(l, device, nominal_device(device.sm));
    return gemm_start_rule(l, m, device);
}

// A measured row for exactly this problem and SM, else the start rule; a negative status if the problem is refused.
inline int choose(const MbqLinear *linear, int m, const MbqDevice &device) {
    const int refused = problem_refusal(linear, m);
    if (refused != MBQ_OK) return refused;
    if (device.sm < 80) return MBQ_E_NO_IMAGE;
    for (const TunedRow &row : kTuned) {
        const bool same = row.scheme == linear->scheme && row.dtype == linear->dtype && row.sm == device.sm &&
                          row.n == linear->n && row.k == linear->k && row.m_first <= m && m <= row.m_last;
        MbqConfig config;
        if (same && find_config(row.config, &config) && config_refusal(*linear, m, config, device) == MBQ_OK)
            return row.config;
    }
    return start_rule(*linear, m, device);
}

// ---- scratch: int8 activations, token scales, parts of K, tickets; each rounded up to 256 bytes ----------------

struct Workspace {
    size_t x_scales, partials, tickets, bytes; // offsets of the parts after the first, and the end
};

constexpr size_t rounded(size_t bytes) { return (bytes + 255) / 256 * 256; }

inline Workspace workspace_for(const MbqLinear &linear, int m, size_t partials, size_t tickets) {
    const bool int8 = linear.scheme == MBQ_W4A8;
    const size_t rows = static_cast<size_t>(m), columns = 128u * static_cast<size_t>(k_tiles_of(linear));
    Workspace found{};
    found.x_scales = int8 ? rounded(rows * columns) : 0;
    found.partials = found.x_scales + (int8 ? rounded(4 * rows) : 0);
    found.tickets = found.partials + rounded(partials);
    found.bytes = found.tickets + rounded(4 * tickets);
    return found;
}

// One per block of outputs whose parts of K meet.
inline size_t tickets_of(const MbqLinear &linear, int m, const MbqConfig &config) {
    if (config.splits == 1) return 0;
    if (config.family == kGemmFamily) return gemm_tickets(config, m, linear.n);
    return static_cast<size_t>(ceil_div(n_tiles_of(linear), config.n_tiles));
}

inline Workspace workspace_for(const MbqLinear &linear, int m, const MbqConfig &config) {
    return workspace_for(linear, m, partial_bytes(linear, m, config.splits), tickets_of(linear, m, config));
}

// Enough for every m <= max_m under every legal config: parts of K grow with m up to where splitting is refused.
inline size_t workspace_bytes(const MbqLinear &linear, int max_m) {
    size_t partials = 0, tickets = 0;
    MbqConfig config;
    for (int i = 0; config_at(i, &config); ++i) {
        const size_t one_row = partial_bytes(linear, 1, config.splits);
        if (one_row == 0 || one_row > kLargestPartials) continue;
        const int limit = config.family == kSkinnyFamily ? config.rows : kLargestSplitRows;
        size_t rows = kLargestPartials / one_row;
        if (rows > static_cast<size_t>(limit)) rows = static_cast<size_t>(limit);
        if (rows > static_cast<size_t>(max_m)) rows = static_cast<size_t>(max_m);
        const size_t meetings = tickets_of(linear, static_cast<int>(rows), config);
        if (rows * one_row > partials) partials = rows * one_row;
        if (meetings > tickets) tickets = meetings;
    }
    return workspace_for(linear, max_m, partials, tickets).bytes;
}

}  // namespace mbq
