// What the 32 lanes of a warp do together. Fragment layouts: mbq/arch.cuh.
#pragma once

#include <cstdint>

#include "threads.h"

namespace mbq {
struct Words4;
}

#pragma GCC visibility push(hidden)

namespace simt {

// Products are exact; products and c are summed in double and rounded once, which a device does in another order.
void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site);
void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site);
void mma_s8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site);

mbq::Words4 ldmatrix4(uint32_t address, Site site);
uint32_t shuffle_xor(uint32_t value, int mask, Site site);

}  // namespace simt

#pragma GCC visibility pop
