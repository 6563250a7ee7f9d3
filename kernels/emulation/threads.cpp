#include "threads.h"

#include <algorithm>
#include <mutex>
#include <vector>

#include "fibers.h"
#include "global_memory.h"
#include "shared_memory.h"

namespace simt {

Options options;
Now now;
Thread *me;

namespace {

constexpr uint32_t kMaxSpins = 1u << 20;
constexpr int kMaxGridYZ = 65535;
constexpr int kInvalidValue = 1, kInvalidConfiguration = 9;  // cudaError_t

struct Warp {
    int arrived = 0;   // lanes that wait for the others
    int finished = 0;
    int first = 0;     // the thread that came first
    uint32_t epoch = 0;
    void *arguments[kLanes] = {};
};

Thread threads[kMaxThreads];
Fiber fibers[kMaxThreads];
Fiber launcher;
Warp warps[kMaxThreads / kLanes];
uint64_t runnable[kMaxThreads / 64];
int prepared = 0;  // fibers that have a stack and an entry
int live = 0;      // threads of the block that have not finished
int at_barrier = 0;
int barrier_first = 0;
int outcome = 0;
uint64_t dice = 0;
void (*kernel)(void *) = nullptr;
void *kernel_closure = nullptr;
std::mutex one_launch;

uint64_t roll() {  // splitmix64
    uint64_t v = dice += 0x9E3779B97F4A7C15u;
    v = (v ^ (v >> 30)) * 0xBF58476D1CE4E5B9u;
    v = (v ^ (v >> 27)) * 0x94D049BB133111EBu;
    return v ^ (v >> 31);
}

std::string name(const Thread &thread) {
    return "thread " + std::to_string(thread.index) + " (warp " + std::to_string(thread.index / kLanes) + ", lane " +
           std::to_string(thread.index % kLanes) + ")";
}

void set_runnable(int index) {
    threads[index].waits_for = nullptr;
    runnable[index / 64] |= uint64_t{1} << (index % 64);
}

void wait_for(const char *what, Site site) {
    me->waits_for = what;
    me->site = site;
    me->spins = 0;
    runnable[me->index / 64] &= ~(uint64_t{1} << (me->index % 64));
}

// The first runnable thread in [begin, end), or -1.
int first_runnable(int begin, int end) {
    for (int at = begin; at < end; at = (at / 64 + 1) * 64) {
        const uint64_t bits = runnable[at / 64] >> (at % 64);
        if (bits == 0) continue;
        const int found = at + __builtin_ctzll(bits);
        return found < end ? found : -1;
    }
    return -1;
}

int last_runnable(int end) {
    for (int at = end - 1; at >= 0; at = at / 64 * 64 - 1) {
        const uint64_t bits = runnable[at / 64] << (63 - at % 64);
        if (bits != 0) return at - __builtin_clzll(bits);
    }
    return -1;
}

int runnable_from(int begin) {
    const int found = first_runnable(begin, now.threads);
    return found >= 0 ? found : first_runnable(0, begin);
}

// Who goes on after thread `last`, or -1.
int next_thread(int last) {
    switch (options.schedule) {
        case Schedule::forward:
            return runnable_from((last + 1) % now.threads);
        case Schedule::reverse: {
            const int found = last_runnable(last);
            return found >= 0 ? found : last_runnable(now.threads);
        }
        case Schedule::shuffled:
            return runnable_from(static_cast<int>(roll() % static_cast<uint64_t>(now.threads)));
        case Schedule::skewed: {
            const int begin = last / kLanes * kLanes;
            return runnable_from(begin);
        }
    }
    return -1;
}

int first_thread() {
    switch (options.schedule) {
        case Schedule::reverse:
            return now.threads - 1;
        case Schedule::skewed:
            return static_cast<int>(options.seed % static_cast<uint64_t>((now.threads + kLanes - 1) / kLanes)) * kLanes;
        default:
            return next_thread(now.threads - 1);
    }
}

// Where threads wait, and how many at each place.
std::string waiting_places() {
    struct Place {
        const Thread *first;
        int threads;
    };
    std::vector<Place> places;
    for (int i = 0; i < now.threads; ++i) {
        const Thread &thread = threads[i];
        if (thread.finished) continue;
        const auto is_same = [&](const Place &place) {
            return place.first->waits_for == thread.waits_for && same(place.first->site, thread.site);
        };
        const auto known = std::find_if(places.begin(), places.end(), is_same);
        if (known == places.end())
            places.push_back(Place{&thread, 1});
        else
            ++known->threads;
    }
    std::string result;
    for (const Place &place : places)
        result += "; " + std::to_string(place.threads) + " from " + name(*place.first) + " on wait for " +
                  place.first->waits_for + " at " + text(place.first->site);
    return result;
}

// Let another thread run; returns when this one can go on.
void yield() {
    const int next = next_thread(me->index);
    if (next < 0) fail(kDeadlock, "nobody can go on" + waiting_places());
    if (next == me->index) return;
    Fiber &from = fibers[me->index];
    me = &threads[next];
    switch_fiber(from, fibers[next]);
}

void open_block_barrier() {
    ++now.epoch;
    at_barrier = 0;
    for (int i = 0; i < now.threads; ++i)
        if (!threads[i].finished) set_runnable(i);
}

void finish() {
    Warp &warp = warps[me->index / kLanes];
    check_no_copies(*me);
    if (warp.arrived > 0) {
        const Thread &other = threads[warp.first];
        fail(kPartialWarp, name(*me) + " ended while " + name(other) + " waits for " + other.waits_for + " at " +
                                text(other.site));
    }
    wait_for("nothing", Site{});
    me->finished = true;
    ++warp.finished;
    --live;
    if (live > 0 && at_barrier == live) open_block_barrier();
    if (live > 0) return yield();
    const int self = me->index;
    me = nullptr;
    switch_fiber(fibers[self], launcher);
}

void thread_entry() {
    for (;;) {
        kernel(kernel_closure);
        finish();
    }
}

// Run the threads of the block that `now` names.
void run_block() {
    now.first_epoch = ++now.epoch;
    poison_shared();
    live = now.threads;
    at_barrier = 0;
    for (int i = 0; i < now.threads; ++i) {
        threads[i].index = i;
        threads[i].finished = false;
        threads[i].spins = 0;
        set_runnable(i);
        if (i >= prepared) prepare(fibers[i], thread_entry);
    }
    prepared = std::max(prepared, now.threads);
    for (int i = 0; i < now.threads; i += kLanes) warps[i / kLanes].arrived = warps[i / kLanes].finished = 0;
    const int first = first_thread();
    me = &threads[first];
    switch_fiber(launcher, fibers[first]);
}

std::vector<uint32_t> order_of_blocks(uint32_t count) {
    std::vector<uint32_t> order(count);
    for (uint32_t i = 0; i < count; ++i) order[i] = i;
    if (options.block_order == BlockOrder::reverse) std::reverse(order.begin(), order.end());
    if (options.block_order == BlockOrder::rotated)
        std::rotate(order.begin(), order.begin() + static_cast<long>(options.seed % count), order.end());
    if (options.block_order == BlockOrder::shuffled)
        for (uint32_t i = count; i > 1; --i) std::swap(order[i - 1], order[roll() % i]);
    return order;
}

}  // namespace

uint32_t warp_epoch(int warp) { return warps[warp].epoch; }

void meet(const char *what, Site site, void *argument, WarpOperation operation) {
    const int begin = me->index / kLanes * kLanes;
    Warp &warp = warps[me->index / kLanes];
    if (now.threads - begin < kLanes || warp.finished > 0)
        fail(kPartialWarp, name(*me) + " waits for " + what + " at " + text(site) + ", but " +
                                (warp.finished > 0 ? "a lane of its warp has ended" : "its warp has fewer lanes"));
    if (warp.arrived == 0) warp.first = me->index;
    const Thread &first = threads[warp.first];
    if (warp.arrived > 0 && !(first.waits_for == what && same(first.site, site)))
        fail(kDivergence, name(first) + " waits for " + first.waits_for + " at " + text(first.site) + ", " +
                              name(*me) + " for " + what + " at " + text(site));
    warp.arguments[me->index % kLanes] = argument;
    wait_for(what, site);
    if (++warp.arrived < kLanes) return yield();
    if (operation != nullptr) operation(warp.arguments);
    warp.arrived = 0;
    for (int i = begin; i < begin + kLanes; ++i) set_runnable(i);
}

void warp_barrier(Site site) {
    const auto advance = [](void *const *) { ++warps[me->index / kLanes].epoch; };
    meet("a warp barrier", site, nullptr, advance);
}

void block_barrier(Site site) {
    if (at_barrier == 0) barrier_first = me->index;
    const Thread &first = threads[barrier_first];
    if (at_barrier > 0 && !same(first.site, site))
        fail(kDivergence, name(first) + " waits for a block barrier at " + text(first.site) + ", " + name(*me) +
                              " at " + text(site));
    wait_for("a block barrier", site);
    if (++at_barrier < live) return yield();
    open_block_barrier();
}

void count_spin(Site site) {
    if (++me->spins > kMaxSpins) fail(kDeadlock, name(*me) + " reads in an endless loop at " + text(site));
}

std::string where_now() {
    static const char *const schedules[] = {"forward", "reverse", "shuffled", "skewed"};
    return "block " + std::to_string(now.x) + " " + std::to_string(now.y) + " " + std::to_string(now.z) + ", " +
           schedules[static_cast<int>(options.schedule)] + " schedule, seed " + std::to_string(options.seed);
}

void abandon_launch(Fault fault) {
    outcome = fault;
    Fiber &from = fibers[me->index];
    me = nullptr;
    switch_fiber(from, launcher);
    __builtin_unreachable();
}

int launch_blocks(int x, int y, int z, int block_threads, size_t shared_bytes, void (*body)(void *), void *closure) {
    const std::lock_guard<std::mutex> lock(one_launch);
    clear_report();
    if (x < 1 || y < 1 || z < 1 || y > kMaxGridYZ || z > kMaxGridYZ || block_threads < 1 || block_threads > kMaxThreads)
        return kInvalidConfiguration;
    if (shared_bytes > static_cast<size_t>(options.device.smem_optin)) return kInvalidValue;
    now.grid_x = x, now.grid_y = y, now.grid_z = z;
    now.threads = block_threads;
    now.shared_bytes = shared_bytes;
    ++now.launch;
    dice = options.seed;
    kernel = body;
    kernel_closure = closure;
    outcome = 0;
    const uint32_t count = static_cast<uint32_t>(x) * static_cast<uint32_t>(y) * static_cast<uint32_t>(z);
    begin_launch(count);
    for (const uint32_t block : order_of_blocks(count)) {
        now.block = block;
        now.x = static_cast<int>(block) % x;
        now.y = static_cast<int>(block) / x % y;
        now.z = static_cast<int>(block) / x / y;
        run_block();
        if (outcome != 0) break;
    }
    if (outcome != 0) {
        prepared = 0;  // stopped in the middle of a kernel: they start afresh
        forget_copies();
    }
    return outcome;
}

}  // namespace simt
