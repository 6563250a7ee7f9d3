// Prints what gemm_configs.h and the swizzle of shared memory work out, for test_gemm_shapes.py.
#include <cstdio>

#include "mbq/gemm_formats.cuh"

using namespace mbq;

int main() {
    for (const MbqConfig &c : kGemmConfigs)
        for (uint32_t scheme : {MBQ_W3A16, MBQ_W4A16, MBQ_W4A8})
            std::printf("config %d %u %zu %zu\n", c.id, scheme, gemm_shared_bytes(c, scheme), gemm_tickets(c, 100, 1000));
    for (int row = 0; row < 8; ++row)
        for (int chunk = 0; chunk < 8; ++chunk)
            std::printf("chunk %d %d %d %d\n", row, chunk, gemm::swizzled<gemm::Float<W3, F16, MBQ_W3A16>>(row, chunk),
                        gemm::swizzled<gemm::Int8<F16, false>>(row, chunk));
}
