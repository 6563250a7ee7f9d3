// Small kernels, each sound as it stands and wrong in one way when `broken`: what the emulation must tell apart.
#include <cstring>

#include "mbq/arch.cuh"

using namespace mbq;

namespace {

struct Params {
    const uint32_t *in;  // [256]
    uint32_t *out;       // [256]
    uint32_t *tickets;   // [1], zero
    uint32_t *partials;  // [256]
    int broken;
};

MBQ_KERNEL neighbour_warp(Params p) {  // a word crosses warps through shared memory
    const uint32_t t = static_cast<uint32_t>(thread_index());
    sts4(4 * t, 0);
    block_barrier();
    sts4(4 * t, load4(p.in + t));
    if (!p.broken) block_barrier();
    store(p.out + t, lds4(4 * (t ^ 32)));
}

MBQ_KERNEL overwritten_word(Params p) {  // a word is written again while others may read it
    const uint32_t t = static_cast<uint32_t>(thread_index());
    sts4(4 * t, load4(p.in + t));
    block_barrier();
    const uint32_t other = lds4(4 * (t ^ 32));
    if (!p.broken) block_barrier();
    sts4(4 * t, other + 1);
    block_barrier();
    store(p.out + t, lds4(4 * (t ^ 1)));
}

MBQ_KERNEL neighbour_lane(Params p) {
    const uint32_t t = static_cast<uint32_t>(thread_index());
    sts4(4 * t, 0);
    block_barrier();
    sts4(4 * t, load4(p.in + t));
    if (!p.broken) warp_barrier();
    store(p.out + t, lds4(4 * (t ^ 1)));
}

MBQ_KERNEL warp_barrier_for_block(Params p) {  // a warp barrier does not order different warps
    const uint32_t t = static_cast<uint32_t>(thread_index());
    sts4(4 * t, 0);
    block_barrier();
    sts4(4 * t, load4(p.in + t));
    if (p.broken)
        warp_barrier();
    else
        block_barrier();
    store(p.out + t, lds4(4 * (t ^ 32)));
}

MBQ_KERNEL matrix_of_others(Params p) {  // ldmatrix hands a lane what other lanes wrote
    const uint32_t t = static_cast<uint32_t>(thread_index());
    sts16(16 * t, load16(p.in + 4 * (t % 32)));
    if (!p.broken) warp_barrier();
    const Words4 v = ldmatrix4(16 * t);
    store(p.out + t, v.x + 3 * v.y + 5 * v.z + 7 * v.w);
}

MBQ_KERNEL copy_and_read(Params p) {
    const uint32_t t = static_cast<uint32_t>(thread_index());
    cp_async16(16 * t, p.in + 4 * (t % 32), true);
    cp_async_commit();
    if (!p.broken) cp_async_wait<0>();
    block_barrier();
    store(p.out + t, lds4(16 * (t ^ 33)));
    cp_async_wait<0>();
}

// Two slots filled in turn, as a pipeline does; reads the group before the newest.
template <int pending>
MBQ_FN uint32_t two_groups(const Params &p, uint32_t t) {
    for (uint32_t slot = 0; slot < 2; ++slot) {
        cp_async16(2048 * slot + 16 * t, p.in + 4 * ((t + slot) % 32), true);
        cp_async_commit();
    }
    cp_async_wait<pending>();
    block_barrier();
    const uint32_t old = lds4(16 * (t ^ 33));
    cp_async_wait<0>();
    return old;
}

MBQ_KERNEL wait_too_short(Params p) {
    const uint32_t t = static_cast<uint32_t>(thread_index());
    store(p.out + t, p.broken ? two_groups<2>(p, t) : two_groups<1>(p, t));
}

MBQ_KERNEL slot_reused_early(Params p) {  // a copy into a slot that other warps may still be reading
    const uint32_t t = static_cast<uint32_t>(thread_index());
    sts16(16 * t, load16(p.in + 4 * (t % 32)));
    block_barrier();
    const uint32_t old = lds4(16 * (t ^ 32));
    if (!p.broken) block_barrier();
    cp_async16(16 * t, p.in, true);
    cp_async_commit();
    cp_async_wait<0>();
    block_barrier();
    store(p.out + t, old + lds4(16 * (t ^ 32)));
}

MBQ_KERNEL copy_left_behind(Params p) {
    const uint32_t t = static_cast<uint32_t>(thread_index());
    cp_async16(16 * t, p.in, false);
    cp_async_commit();
    if (!p.broken) cp_async_wait<0>();
    store(p.out + t, t);
}

MBQ_KERNEL unwritten_word(Params p) {
    const uint32_t t = static_cast<uint32_t>(thread_index());
    if (!p.broken || t != 5) sts4(4 * t, t);
    store(p.out + t, lds4(4 * t));
}

MBQ_KERNEL two_shuffles(Params p) {  // lanes of one warp at two places
    const uint32_t t = static_cast<uint32_t>(thread_index());
    uint32_t v = t;
    if (p.broken && t % 2 == 0)
        v = shuffle_xor(v, 2);
    else
        v = shuffle_xor(v, 2);
    store(p.out + t, v);
}

MBQ_KERNEL loop_of_shuffles(Params p) {  // lanes of one warp make different numbers of steps
    const uint32_t t = static_cast<uint32_t>(thread_index());
    const uint32_t steps = p.broken && t % 32 == 7 ? 3 : 4;
    uint32_t v = t;
    for (uint32_t i = 0; i < steps; ++i) v += shuffle_xor(v, 1);
    v += shuffle_xor(v, 2);
    store(p.out + t, v);
}

MBQ_KERNEL early_exit(Params p) {
    const uint32_t t = static_cast<uint32_t>(thread_index());
    if (p.broken && t == 40) return;
    store(p.out + t, shuffle_xor(t, 1));
}

MBQ_KERNEL early_warp(Params p) {  // a whole warp may end before the others' barrier
    const uint32_t t = static_cast<uint32_t>(thread_index());
    if (t >= 96) return;
    sts4(4 * t, t);
    if (!p.broken || t < 32) block_barrier();
    store(p.out + t, lds4(4 * (t ^ 1)));
}

MBQ_KERNEL two_barriers(Params p) {
    const uint32_t t = static_cast<uint32_t>(thread_index());
    if (p.broken && t < 32)
        block_barrier();
    else
        block_barrier();
    store(p.out + t, t);
}

MBQ_KERNEL barrier_in_branch(Params p) {  // half a warp at the block's barrier, half at its own
    const uint32_t t = static_cast<uint32_t>(thread_index());
    if (!p.broken || t % 2 == 0) block_barrier();
    warp_barrier();
    store(p.out + t, t);
}

MBQ_KERNEL past_the_end(Params p) {
    const uint32_t t = static_cast<uint32_t>(thread_index());
    store(p.out + t, load4(p.in + t + (p.broken ? 129 : 128)));
}

MBQ_KERNEL before_the_start(Params p) {
    const uint32_t t = static_cast<uint32_t>(thread_index());
    store(p.out + t - (p.broken && t == 0 ? 1 : 0), t);
}

MBQ_KERNEL copy_past_the_end(Params p) {  // a copy that is not valid reads nothing
    const uint32_t t = static_cast<uint32_t>(thread_index());
    cp_async16(16 * t, p.in + 4 * t, p.broken || t < 64);
    cp_async_commit();
    cp_async_wait<0>();
    store(p.out + t, lds4(16 * t));
}

MBQ_KERNEL past_shared(Params p) {
    const uint32_t t = static_cast<uint32_t>(thread_index());
    sts16(16 * t + (p.broken ? 4096 - 16 * 127 : 0), Words4{t, t, t, t});
    store(p.out + t, t);
}

MBQ_KERNEL misaligned_load(Params p) {
    const uint32_t t = static_cast<uint32_t>(thread_index());
    store(p.out + t, load16(p.in + 4 * (t % 32) + (p.broken ? 2 : 0)).x);
}

MBQ_KERNEL misaligned_shared(Params p) {
    const uint32_t t = static_cast<uint32_t>(thread_index());
    sts16(16 * t + (p.broken ? 8 : 0), Words4{t, t, t, t});
    store(p.out + t, t);
}

MBQ_KERNEL misaligned_matrix(Params p) {
    const uint32_t t = static_cast<uint32_t>(thread_index());
    sts16(16 * t, Words4{t, t, t, t});
    warp_barrier();
    store(p.out + t, ldmatrix4(16 * t + (p.broken ? 8 : 0)).x);
}

MBQ_KERNEL store_to_input(Params p) {
    const uint32_t t = static_cast<uint32_t>(thread_index());
    store(p.broken ? const_cast<uint32_t *>(p.in) + t : p.out + t, t);
}

MBQ_KERNEL cached_load(Params p) {  // the read-only path may return what was there before the launch
    const uint32_t t = static_cast<uint32_t>(thread_index());
    store(p.partials + t, t);
    block_barrier();
    store(p.out + t, p.broken ? load4(p.partials + (t ^ 1)) : load_coherent4(p.partials + (t ^ 1)));
}

MBQ_KERNEL global_exchange(Params p) {
    const uint32_t t = static_cast<uint32_t>(thread_index());
    store(p.partials + t, t);
    if (!p.broken) block_barrier();
    store(p.out + t, load_coherent4(p.partials + (t ^ 1)));
}

MBQ_KERNEL two_writers(Params p) {  // two blocks store one element
    const int t = thread_index();
    if (p.broken || block_x() == 0) store(p.out + t, static_cast<uint32_t>(t));
}

MBQ_KERNEL half_words(Params p) {  // neighbours within a word are different elements
    const int t = thread_index();
    uint16_t *out = reinterpret_cast<uint16_t *>(p.out);
    if (block_x() == 0) store(out + (p.broken ? t / 2 : t), static_cast<uint16_t>(7));
}

// Blocks add up their parts: each stores one, the last to arrive sums them in index order.
MBQ_FN void sum_of_blocks(const Params &p, bool with_fence, bool with_barrier) {
    const int t = thread_index(), blocks = grid_x();
    if (t < 32) store(p.partials + 32 * block_x() + t, load4(p.in + 32 * block_x() + t));
    if (with_fence) fence_device();
    if (with_barrier) block_barrier();
    if (t == 0) sts4(0, atomic_add(p.tickets, 1));
    block_barrier();
    if (lds4(0) != static_cast<uint32_t>(blocks) - 1 || t >= 32) return;
    uint32_t sum = 0;
    for (int i = 0; i < blocks; ++i) sum = 3 * sum + load_coherent4(p.partials + 32 * i + t);
    store(p.out + t, sum);
}

MBQ_KERNEL sum_without_fence(Params p) { sum_of_blocks(p, !p.broken, true); }
MBQ_KERNEL sum_without_barrier(Params p) { sum_of_blocks(p, true, !p.broken); }

MBQ_KERNEL wait_for_a_block(Params p) {  // blocks may run one after another: nobody ever comes
    while (p.broken && load_coherent4(p.tickets) == 0) {
    }
    store(p.partials + 128 * block_x() + thread_index(), 1u);
}

struct Case {
    const char *name;
    void (*kernel)(Params);
    int blocks;
};

#define CASE(name, blocks) \
    { #name, name, blocks }
constexpr Case kCases[] = {
    CASE(neighbour_warp, 1),    CASE(overwritten_word, 1),    CASE(neighbour_lane, 1),    CASE(warp_barrier_for_block, 1),
    CASE(matrix_of_others, 1),  CASE(copy_and_read, 1),       CASE(wait_too_short, 1),    CASE(slot_reused_early, 1),
    CASE(copy_left_behind, 1),  CASE(unwritten_word, 1),      CASE(two_shuffles, 1),      CASE(loop_of_shuffles, 1),
    CASE(early_exit, 1),        CASE(early_warp, 1),          CASE(two_barriers, 1),      CASE(barrier_in_branch, 1),
    CASE(past_the_end, 1),      CASE(before_the_start, 1),    CASE(copy_past_the_end, 1), CASE(past_shared, 1),
    CASE(misaligned_load, 1),   CASE(misaligned_shared, 1),   CASE(misaligned_matrix, 1), CASE(store_to_input, 1),
    CASE(cached_load, 1),       CASE(global_exchange, 1),     CASE(two_writers, 2),       CASE(half_words, 2),
    CASE(sum_without_fence, 5), CASE(sum_without_barrier, 5), CASE(wait_for_a_block, 2),
};

}  // namespace

// Run a case by name with blocks of 128 threads and 4 KB of shared memory; -1 for an unknown name.
extern "C" MBQ_API int rules_run(const char *name, int broken, const uint32_t *in, uint32_t *out, uint32_t *tickets,
                                 uint32_t *partials) {
    for (const Case &known : kCases)
        if (std::strcmp(known.name, name) == 0)
            return launch<Params>(known.kernel, Grid{known.blocks, 1, 1}, 128, 4096, nullptr,
                                  Params{in, out, tickets, partials, broken});
    return -1;
}
