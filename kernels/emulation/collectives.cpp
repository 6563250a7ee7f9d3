#include "collectives.h"

#include <cstring>

#include "mbq/arch.cuh"
#include "numbers.h"
#include "shared_memory.h"

namespace simt {
namespace {

constexpr int kRows = 16, kColumns = 8;  // of C

template <class Sum>
struct Mma {
    Sum *c;
    const uint32_t *a;
    uint32_t b[2];
};

template <class Sum>
const Mma<Sum> &lane_of(void *const *arguments, int lane) {
    return *static_cast<const Mma<Sum> *>(arguments[lane]);
}

// A [16, depth] and B [depth, 8] as numbers, collected from the registers of 32 lanes. A register holds `per_word`
// neighbours along the depth; a0, a1 and b0 cover its first half, a2, a3 and b1 the second.
template <class Sum, class Number, int kDepth>
struct Fragments {
    Number a[kRows][kDepth];
    Number b[kColumns][kDepth];

    template <class Element>
    Fragments(void *const *arguments, int bits, Element element) {
        const int per_word = kDepth / 8, half = kDepth / 2;
        for (int lane = 0; lane < kLanes; ++lane) {
            const int g = lane / 4, t = lane % 4;
            const Mma<Sum> &mine = lane_of<Sum>(arguments, lane);
            for (int r = 0; r < 4; ++r)
                for (int i = 0; i < per_word; ++i)
                    a[g + 8 * (r % 2)][half * (r / 2) + per_word * t + i] = element(mine.a[r] >> (bits * i));
            for (int r = 0; r < 2; ++r)
                for (int i = 0; i < per_word; ++i)
                    b[g][half * r + per_word * t + i] = element(mine.b[r] >> (bits * i));
        }
    }
};

template <float element(uint32_t)>
void multiply_16_bit(void *const *arguments) {
    const Fragments<float, double, 16> factors(arguments, 16, [](uint32_t bits) { return element(bits & 0xFFFFu); });
    for (int lane = 0; lane < kLanes; ++lane)
        for (int i = 0; i < 4; ++i) {
            const double *a = factors.a[lane / 4 + 8 * (i / 2)], *b = factors.b[2 * (lane % 4) + i % 2];
            float &c = lane_of<float>(arguments, lane).c[i];
            double sum = 0.0;
            for (int k = 0; k < 16; ++k) sum += a[k] * b[k];
            c = quiet(static_cast<float>(sum + static_cast<double>(c)));
        }
}

void multiply_s8(void *const *arguments) {
    const auto element = [](uint32_t bits) { return static_cast<int32_t>(static_cast<int8_t>(bits & 0xFFu)); };
    const Fragments<int32_t, int32_t, 32> factors(arguments, 8, element);
    for (int lane = 0; lane < kLanes; ++lane)
        for (int i = 0; i < 4; ++i) {
            const int32_t *a = factors.a[lane / 4 + 8 * (i / 2)], *b = factors.b[2 * (lane % 4) + i % 2];
            int32_t &c = lane_of<int32_t>(arguments, lane).c[i];
            int32_t sum = 0;
            for (int k = 0; k < 32; ++k) sum += a[k] * b[k];
            c = static_cast<int32_t>(static_cast<uint32_t>(c) + static_cast<uint32_t>(sum));
        }
}

struct Shuffle {
    uint32_t value, result;
    int mask;
};

void shuffle(void *const *arguments) {
    for (int lane = 0; lane < kLanes; ++lane) {
        Shuffle &mine = *static_cast<Shuffle *>(arguments[lane]);
        mine.result = static_cast<Shuffle *>(arguments[(lane ^ mine.mask) % kLanes])->value;
    }
}

struct Rows {
    uint32_t address;
    Site site;
    uint32_t words[4];
};

// Lane 4 r + w receives word w of row r of each matrix, so it is the one who reads it.
void load_matrices(void *const *arguments) {
    const int first = me->index / kLanes * kLanes;
    for (int row = 0; row < kLanes; ++row) {
        const Rows &given = *static_cast<Rows *>(arguments[row]);
        if (given.address % 16 != 0)
            fail(kMisaligned, "matrix row of lane " + std::to_string(row) + " at byte " +
                                  std::to_string(given.address) + " of shared memory at " + text(given.site));
        for (int word = 0; word < 4; ++word) {
            const int lane = 4 * (row % 8) + word;
            const uint8_t *source = shared_read_of(first + lane, given.address + 4 * static_cast<uint32_t>(word),
                                                   given.site);
            std::memcpy(&static_cast<Rows *>(arguments[lane])->words[row / 8], source, 4);
        }
    }
}

}  // namespace

void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site) {
    Mma<float> mine{c, a, {b0, b1}};
    meet("mma f16", site, &mine, multiply_16_bit<f16_to_float>);
}

void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site) {
    Mma<float> mine{c, a, {b0, b1}};
    meet("mma bf16", site, &mine, multiply_16_bit<bf16_to_float>);
}

void mma_s8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site) {
    Mma<int32_t> mine{c, a, {b0, b1}};
    meet("mma s8", site, &mine, multiply_s8);
}

mbq::Words4 ldmatrix4(uint32_t address, Site site) {
    Rows mine{address, site, {}};
    meet("ldmatrix", site, &mine, load_matrices);
    return mbq::Words4{mine.words[0], mine.words[1], mine.words[2], mine.words[3]};
}

uint32_t shuffle_xor(uint32_t value, int mask, Site site) {
    Shuffle mine{value, 0, mask};
    meet("shuffle", site, &mine, shuffle);
    return mine.result;
}

}  // namespace simt
