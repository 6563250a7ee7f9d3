// What the emulation can find wrong with a kernel, and where in its source.
#pragma once

#include <string>

#pragma GCC visibility push(hidden)

namespace simt {

// A line of a kernel. As a default argument it names the caller of the function that has it.
struct Site {
    const char *file = "";
    int line = 0;

    static constexpr Site here(const char *file = __builtin_FILE(), int line = __builtin_LINE()) {
        return Site{file, line};
    }
};

bool same(Site a, Site b);
std::string text(Site site);

// Statuses of a launch; a cudaError_t is below 10000.
enum Fault : int {
    kSharedRace = 10001,    // two threads, one word, one of them writes, no barrier between
    kUnwrittenRead = 10002, // shared memory that nobody wrote in this block
    kMissingWait = 10003,   // shared memory that a copy may still be filling
    kUnwaitedCopy = 10004,  // a thread ended with copies under way
    kDivergence = 10005,     // lanes of a warp, or threads of a block, met at different places
    kPartialWarp = 10006,   // a collective without all 32 lanes
    kDeadlock = 10007,       // nobody can go on
    kOutOfBounds = 10008,  // outside every registered buffer, or of shared memory
    kMisaligned = 10009,     // an address that is not a multiple of the access
    kReadOnly = 10010,      // a store to a read-only buffer
    kStaleRead = 10011,     // a read-only load of what this launch wrote
    kGlobalRace = 10012,    // two threads, one global element, no barrier or published ticket between
    kUnpublished = 10013,    // another block's store that no fence and ticket made visible
};

// Static text of a fault, or of the few CUDA statuses that the emulation returns.
const char *error_text(int status);

// The last fault in full: what, where, both sites, which threads. Empty after a launch without one.
const std::string &message();

// Set status and message of a fault met outside a launch; returns the status.
int report(Fault fault, const std::string &what);
void clear_report();

// Give up the running launch: its threads are dropped where they are.
[[noreturn]] void fail(Fault fault, const std::string &what);

}  // namespace simt

#pragma GCC visibility pop
