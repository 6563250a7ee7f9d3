// A launch: its blocks one after another, each thread of a block on a fiber, and the places where threads meet.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "faults.h"
#include "mbq/mbq.h"

#pragma GCC visibility push(hidden)

namespace simt {

constexpr int kLanes = 32;
constexpr int kMaxThreads = 1024;

// Who goes on when a thread waits.
enum class Schedule : int {
    forward = 0,   // the next higher index that can
    reverse = 1,   // the next lower one
    shuffled = 2,  // any, by seed
    skewed = 3,    // one warp as far as it gets, then the next; the seed says which is first
};

enum class BlockOrder : int {
    forward = 0,
    reverse = 1,
    rotated = 2,   // starts at block `seed`, so that block `seed - 1` is last
    shuffled = 3,  // by seed
};

struct Options {
    Schedule schedule = Schedule::forward;
    BlockOrder block_order = BlockOrder::forward;
    uint64_t seed = 0;
    uint8_t poison = 0xFF;  // what shared memory is filled with before each block
    MbqDevice device{90, 132, 232448, 52428800};
};
extern Options options;

struct Thread {
    int index;
    bool finished;
    Site site;               // where it waits
    const char *waits_for;   // null while it can go on
    uint32_t spins;          // coherent loads since it last waited
};

// What runs now. An epoch is the time between two block barriers; numbers never repeat within a process.
struct Now {
    int grid_x, grid_y, grid_z;
    int x, y, z;
    int threads;
    size_t shared_bytes;
    uint32_t launch;
    uint32_t block;          // in the order of x, y, z, x fastest
    uint32_t epoch;
    uint32_t first_epoch;    // of this block
};
extern Now now;
extern Thread *me;

inline int thread_index() { return me->index; }
inline int block_threads() { return now.threads; }
inline int block_x() { return now.x; }
inline int block_y() { return now.y; }
inline int block_z() { return now.z; }
inline int grid_x() { return now.grid_x; }

// Barriers of a warp since the process began: orders accesses of its own lanes.
uint32_t warp_epoch(int warp);

// Wait for the 32 lanes of the warp at this site; the last one calls `operation` with every lane's argument.
using WarpOperation = void (*)(void *const *arguments);
void meet(const char *what, Site site, void *argument, WarpOperation operation);

void block_barrier(Site site);
void warp_barrier(Site site);

// Count a load that may be part of a loop that waits for another block, which cannot run here.
void count_spin(Site site);

std::string where_now();
[[noreturn]] void abandon_launch(Fault fault);

// Run `body(closure)` for every thread of every block. 0, a cudaError_t for a bad configuration, or a Fault.
int launch_blocks(int x, int y, int z, int threads, size_t shared_bytes, void (*body)(void *), void *closure);

template <class Body>
int launch(int x, int y, int z, int threads, size_t shared_bytes, Body body) {
    const auto call = [](void *closure) { (*static_cast<Body *>(closure))(); };
    return launch_blocks(x, y, z, threads, shared_bytes, call, &body);
}

inline MbqDevice device() { return options.device; }

}  // namespace simt

#pragma GCC visibility pop
