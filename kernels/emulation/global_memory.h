// Global memory: only registered buffers may be touched, each store of a launch is remembered.
//
// A kernel that loads what its own launch wrote must use a coherent load. If another block wrote it, that block must
// have made it visible: all its stores, a fence, and then an atomic addition to a ticket that this block has read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "threads.h"

#pragma GCC visibility push(hidden)

namespace simt {

enum class Access { read_only, coherent };

// Bounds, alignment and order of an access of the running thread; ends the launch if one is wrong.
void check_load(const void *address, size_t bytes, Access access, Site site);
void check_store(const void *address, size_t bytes, Site site);

template <class T>
T load(const void *address, Access access, Site site) {
    check_load(address, sizeof(T), access, site);
    T value;
    std::memcpy(&value, address, sizeof(T));
    return value;
}

template <class T>
void store(void *address, const T &value, Site site) {
    check_store(address, sizeof(T), site);
    std::memcpy(address, &value, sizeof(T));
}

uint32_t atomic_add(uint32_t *address, uint32_t value, Site site);
void fence_device();

// cudaMemsetAsync with 0: 0, or a Fault where the bytes are not in one writable buffer.
int zero(void *address, size_t bytes);

// Allow access to a buffer. False if it overlaps another one; the same start replaces the old registration.
bool register_buffer(const void *address, size_t bytes, bool writable);
void forget_buffers();

// For the launch: nothing has been stored yet.
void begin_launch(uint32_t blocks);

}  // namespace simt

#pragma GCC visibility pop
