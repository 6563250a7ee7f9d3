// The block's dynamic shared memory: checked access, copies in the background, and a record of who touched what.
//
// Accesses of two threads to one 4-byte word, at least one of them a write, need a barrier between them: a block
// barrier, or a warp barrier if both are lanes of one warp. A copy in the background is a write that may happen at any
// time between its issue and its wait. Here it happens at the wait, as late as a device may do it.
#pragma once

#include <cstdint>
#include <cstring>

#include "threads.h"

#pragma GCC visibility push(hidden)

namespace simt {

// Check bounds and alignment of an access of the running thread, record it, and return where the bytes are.
const uint8_t *shared_read(uint32_t address, uint32_t bytes, Site site);
uint8_t *shared_write(uint32_t address, uint32_t bytes, Site site);

// The same for a read of one word by another lane of the running thread's warp, which waits at a collective.
const uint8_t *shared_read_of(int thread, uint32_t address, Site site);

template <class T>
T shared_load(uint32_t address, Site site) {
    T value;
    std::memcpy(&value, shared_read(address, sizeof(T), site), sizeof(T));
    return value;
}

template <class T>
void shared_store(uint32_t address, const T &value, Site site) {
    std::memcpy(shared_write(address, sizeof(T), site), &value, sizeof(T));
}

// 16 or 8 bytes into shared memory, from global memory or, if not valid, zeros; done by cp_async_wait.
void cp_async16(uint32_t shared, const void *global, bool valid, Site site);
void cp_async8(uint32_t shared, const void *global, bool valid, Site site);
void cp_async_commit(Site site);
void cp_async_wait(int pending, Site site);

// For the launch: fill with the poison byte, forget every touch of earlier blocks.
void poison_shared();
// A thread must not end with copies under way.
void check_no_copies(const Thread &thread);
void forget_copies();

}  // namespace simt

#pragma GCC visibility pop
