// C functions that the emulated library offers beside mbq.h, for tests.
#include <string>

#include "simt.h"

extern "C" {

// Schedule and block order by number (threads.h), and the seed of both. MBQ_OK, or MBQ_E_CONFIG.
MBQ_API int mbq_emulation_configure(int schedule, uint64_t seed, int block_order) {
    if (schedule < 0 || schedule > 3 || block_order < 0 || block_order > 3) return MBQ_E_CONFIG;
    simt::options.schedule = static_cast<simt::Schedule>(schedule);
    simt::options.block_order = static_cast<simt::BlockOrder>(block_order);
    simt::options.seed = seed;
    return MBQ_OK;
}

// Let kernels touch a buffer. MBQ_OK; MBQ_E_NULL; MBQ_E_SHAPE where it overlaps another.
MBQ_API int mbq_emulation_register(const void *address, size_t bytes, int writable) {
    if (address == nullptr) return MBQ_E_NULL;
    return simt::register_buffer(address, bytes, writable != 0) ? MBQ_OK : MBQ_E_SHAPE;
}

MBQ_API void mbq_emulation_forget_all(void) { simt::forget_buffers(); }

// The byte that fills shared memory before each block.
MBQ_API void mbq_emulation_poison(int byte) { simt::options.poison = static_cast<uint8_t>(byte); }

// The device that launches see; an H100 at first.
MBQ_API void mbq_emulation_device(const MbqDevice *device) { simt::options.device = *device; }

// The last fault in full, until the next launch.
MBQ_API const char *mbq_emulation_message(void) { return simt::message().c_str(); }

}
