// Reading memory and nothing else: the ceiling that every other kernel is measured against.
//
// The sum keeps the loads alive and tells a test that each word was read exactly once.
#pragma once

#include "mbq/arch.cuh"

namespace mbq {

struct ReadBwParams {
    const uint8_t *bytes;
    uint64_t vectors; // of 16 bytes
    uint32_t *sum;    // zero before the launch
};

namespace read_bw {

constexpr int kThreads = 256;
constexpr int kInFlight = 4;   // loads of one thread under way at once
constexpr int kBlocksPerSm = 8;
constexpr uint64_t kBlockVectors = uint64_t{kThreads} * kInFlight;

MBQ_FN uint32_t word_sum(const Words4 &v) { return v.x + v.y + v.z + v.w; }

MBQ_FN uint32_t warp_sum(uint32_t value) {
    for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
    return value;
}

}  // namespace read_bw

// Grid: any; blocks take turns at stretches of kBlockVectors.
MBQ_KERNEL MBQ_BOUNDS(256, 4) read_bw_kernel(const ReadBwParams p) {
    using namespace read_bw;
    const uint64_t thread = static_cast<uint64_t>(thread_index());
    const uint64_t stride = kBlockVectors * static_cast<uint64_t>(grid_x());
    uint32_t sum = 0;
    for (uint64_t first = kBlockVectors * static_cast<uint64_t>(block_x()); first < p.vectors; first += stride) {
        Words4 v[kInFlight];
        MBQ_UNROLL
        for (int i = 0; i < kInFlight; ++i) {
            const uint64_t at = first + static_cast<uint64_t>(i * kThreads) + thread;
            v[i] = Words4{0, 0, 0, 0};
            if (at < p.vectors) v[i] = load_stream16(p.bytes + 16 * at);
        }
        MBQ_UNROLL
        for (int i = 0; i < kInFlight; ++i) sum += word_sum(v[i]);
    }
    sum = warp_sum(sum);
    const uint32_t shared = shared_base();
    if (lane_index() == 0) sts4(shared + 4u * static_cast<uint32_t>(warp_index()), sum);
    block_barrier();
    if (thread_index() != 0) return;
    sum = 0;
    for (uint32_t warp = 0; warp < kThreads / 32; ++warp) sum += lds4(shared + 4 * warp);
    atomic_add(p.sum, sum);
}

MBQ_HOST_FN int launch_read_bw_kernel(const ReadBwParams &p, CUstream_st *stream) {
    MbqDevice device{};
    const int error = current_device(&device);
    if (error != 0) return error;
    const uint64_t most = static_cast<uint64_t>(read_bw::kBlocksPerSm) * static_cast<uint64_t>(device.sm_count);
    const uint64_t stretches = (p.vectors + read_bw::kBlockVectors - 1) / read_bw::kBlockVectors;
    const int blocks = static_cast<int>(stretches < most ? stretches : most);
    return launch(read_bw_kernel, Grid{blocks, 1, 1}, read_bw::kThreads, read_bw::kThreads / 32 * 4, stream, p);
}

}  // namespace mbq
