// Every instruction of arch.cuh on seeded numbers, printed with its inputs: the same program for a GPU (nvcc) and for
// the emulation (g++ -DMBQ_EMULATION), so that the two can be compared bit by bit.
//
// Output: "operation NAME COMPARE", then lines "in J" and "out J" of kThreads hexadecimal words each.
// COMPARE: exact; ulp2; sum (fp32 sums of 16-bit products, which a device adds in its own order).
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "mbq/arch.cuh"
#if defined(MBQ_EMULATION)
extern "C" int mbq_emulation_register(const void *address, size_t bytes, int writable);
extern "C" const char *mbq_emulation_message(void);
#endif

using namespace mbq;

namespace {

constexpr int kBlockThreads = 64, kBlocks = 2, kThreads = kBlockThreads * kBlocks;
constexpr int kMaxIn = 10, kMaxOut = 9;
constexpr size_t kSharedBytes = 8192;

struct Params {
    const uint32_t *in;  // [kMaxIn, kThreads]
    uint32_t *out;       // [kMaxOut, kThreads], zero
};

MBQ_FN int global_thread() { return block_x() * block_threads() + thread_index(); }
MBQ_FN uint32_t operand(const Params &p, int j) { return load4(p.in + j * kThreads + global_thread()); }
MBQ_FN void result(const Params &p, int j, uint32_t v) { store(p.out + j * kThreads + global_thread(), v); }

#define ELEMENTWISE(name, value)                                          \
    MBQ_KERNEL name(Params p) {                                           \
        const uint32_t a = operand(p, 0), b = operand(p, 1), c = operand(p, 2); \
        const float x = float_of_bits(a), y = float_of_bits(b), z = float_of_bits(c); \
        (void)x, (void)y, (void)z;                                        \
        result(p, 0, static_cast<uint32_t>(value));                       \
    }
ELEMENTWISE(f16_add2, F16::add2(a, b))
ELEMENTWISE(f16_mul2, F16::mul2(a, b))
ELEMENTWISE(f16_fma2, F16::fma2(a, b, c))
ELEMENTWISE(f16_to_float, bits_of_float(F16::to_float(a)))
ELEMENTWISE(f16_from_float, F16::from_float(x))
ELEMENTWISE(bf16_add2, BF16::add2(a, b))
ELEMENTWISE(bf16_mul2, BF16::mul2(a, b))
ELEMENTWISE(bf16_fma2, BF16::fma2(a, b, c))
ELEMENTWISE(bf16_to_float, bits_of_float(BF16::to_float(a)))
ELEMENTWISE(bf16_from_float, BF16::from_float(x))
ELEMENTWISE(f32_add, bits_of_float(add_rn(x, y)))
ELEMENTWISE(f32_mul, bits_of_float(mul_rn(x, y)))
ELEMENTWISE(f32_fma, bits_of_float(fma_rn(x, y, z)))
ELEMENTWISE(f32_div, bits_of_float(div_rn(x, y)))
ELEMENTWISE(f32_exponential, bits_of_float(exponential(x)))
ELEMENTWISE(f32_rint_to_int, rint_to_int(x))
ELEMENTWISE(int_to_float, bits_of_float(to_float(static_cast<int32_t>(a))))
ELEMENTWISE(and_or_bits, and_or(a, b, c))
#undef ELEMENTWISE

template <class T>
MBQ_KERNEL mma_float(Params p) {
    float c[4];
    uint32_t a[4];
    for (int j = 0; j < 4; ++j) a[j] = operand(p, j), c[j] = float_of_bits(operand(p, 6 + j));
    T::mma(c, a, operand(p, 4), operand(p, 5));
    for (int j = 0; j < 4; ++j) result(p, j, bits_of_float(c[j]));
}

MBQ_KERNEL mma_int8(Params p) {
    int32_t c[4];
    uint32_t a[4];
    for (int j = 0; j < 4; ++j) a[j] = operand(p, j), c[j] = static_cast<int32_t>(operand(p, 6 + j));
    mma_s8(c, a, operand(p, 4), operand(p, 5));
    for (int j = 0; j < 4; ++j) result(p, j, static_cast<uint32_t>(c[j]));
}

MBQ_KERNEL shuffles(Params p) {
    const uint32_t a = operand(p, 0);
    for (int j = 0; j < 5; ++j) result(p, j, shuffle_xor(a, 1 << j));
    result(p, 5, shuffle_xor(a, 31));
}

// Each warp stores 512 bytes; lane i hands in the address of the row that its input chooses.
MBQ_KERNEL matrices(Params p) {
    const uint32_t base = shared_base() + 512 * static_cast<uint32_t>(warp_index());
    const uint32_t lane = static_cast<uint32_t>(lane_index());
    sts16(base + 16 * lane, Words4{operand(p, 0), operand(p, 1), operand(p, 2), operand(p, 3)});
    warp_barrier();
    const Words4 v = ldmatrix4(base + 16 * (operand(p, 4) % 32));
    result(p, 0, v.x), result(p, 1, v.y), result(p, 2, v.z), result(p, 3, v.w);
}

// Words cross warps through shared memory, stored and loaded in every width.
MBQ_KERNEL shared_words(Params p) {
    const uint32_t base = shared_base(), t = static_cast<uint32_t>(thread_index());
    sts4(base + 4 * t, operand(p, 0));
    sts16(base + 512 + 16 * t, Words4{operand(p, 1), operand(p, 2), operand(p, 3), operand(p, 4)});
    block_barrier();
    const Words2 two = lds8(base + 8 * ((t ^ 33) % 32));
    const Words4 four = lds16(base + 512 + 16 * (t ^ 34));
    result(p, 0, two.x), result(p, 1, two.y), result(p, 2, lds4(base + 512 + 4 * (t ^ 37)));
    result(p, 3, four.x), result(p, 4, four.y), result(p, 5, four.z), result(p, 6, four.w);
}

// Two groups of copies, every fifth thread's zeros; the first group is read while the second may be under way.
MBQ_KERNEL copies(Params p) {
    const uint32_t base = shared_base(), t = static_cast<uint32_t>(thread_index());
    for (uint32_t group = 0; group < 2; ++group) {
        const uint32_t *source = p.in + 4 * (group * 32 + t % 32) + kThreads * block_x();
        cp_async16(base + 2048 * group + 16 * t, source, t % 5 != group);
        cp_async_commit();
    }
    cp_async_wait<1>();
    block_barrier();
    const Words4 first = lds16(base + 16 * (t ^ 33));
    cp_async_wait<0>();
    block_barrier();
    const Words4 second = lds16(base + 2048 + 16 * (t ^ 34));
    result(p, 0, first.x), result(p, 1, first.y), result(p, 2, first.z), result(p, 3, first.w);
    result(p, 4, second.x), result(p, 5, second.y), result(p, 6, second.z), result(p, 7, second.w);
}

MBQ_KERNEL small_copies(Params p) {  // 8 bytes each, a third of them zeros
    const uint32_t base = shared_base(), t = static_cast<uint32_t>(thread_index());
    cp_async8(base + 8 * t, p.in + 2 * t + kThreads * block_x(), t % 3 != 1);
    cp_async_commit();
    cp_async_wait<0>();
    block_barrier();
    const Words2 v = lds8(base + 8 * (t ^ 33));
    result(p, 0, v.x), result(p, 1, v.y);
}

MBQ_KERNEL wide_loads(Params p) {
    const uint32_t *from = p.in + 4 * (global_thread() ^ 7);
    const Words4 a = load16(from), b = load_stream16(from + kThreads);
    const Words2 c = load8(from + 2), d = load_stream8(from + 2 * kThreads);
    result(p, 0, a.x), result(p, 1, a.y), result(p, 2, a.z), result(p, 3, a.w);
    result(p, 4, b.x ^ b.w), result(p, 5, b.y ^ b.z), result(p, 6, c.x ^ c.y), result(p, 7, d.x ^ d.y);
}

MBQ_KERNEL narrow_loads(Params p) {
    const uint32_t *from = p.in + (global_thread() ^ 5);
    const uint8_t *bytes = settled(reinterpret_cast<const uint8_t *>(from));
    result(p, 0, load4(from)), result(p, 1, load_stream4(from)), result(p, 2, load_coherent4(from));
    result(p, 3, load2(bytes)), result(p, 4, load2(bytes + 2));
    result(p, 5, load1(bytes)), result(p, 6, load1(bytes + 1)), result(p, 7, load1(bytes + 3));
}

MBQ_KERNEL stores(Params p) {
    const int t = global_thread();
    const uint32_t a = operand(p, 0), b = operand(p, 1), c = operand(p, 2), d = operand(p, 3);
    uint16_t *halves = reinterpret_cast<uint16_t *>(p.out);
    store(halves + 2 * t, static_cast<uint16_t>(a)), store(halves + 2 * t + 1, static_cast<uint16_t>(b));
    store(p.out + kThreads + t, c), store(reinterpret_cast<float *>(p.out + 2 * kThreads + t), float_of_bits(d));
    const bool even = t % 2 == 0;  // rows 3 and 4 in pairs, 5 and 6 in fours, by every second thread
    if (even) store(p.out + 3 * kThreads + 2 * t, Words2{a, b});
    if (even) store(p.out + 5 * kThreads + 4 * t / 2, Words4{a, b, c, d});
}

// Old values are handed out once each; blocks see each other's additions.
MBQ_KERNEL tickets(Params p) {
    const uint32_t old = atomic_add(p.out + 2 * kThreads, 3);
    store(p.out + old / 3, old);
    fence_device();
}

MBQ_KERNEL places(Params p) {
    const int values[9] = {thread_index(), block_threads(), block_x(),    block_y(),      block_z(),
                           grid_x(),       lane_index(),    warp_index(), block_x_again()};
    for (int j = 0; j < 9; ++j) result(p, j, static_cast<uint32_t>(values[j]));
}

enum class Draw { any, f16, bf16, f32, f16_integers, bf16_integers, f16_products, bf16_products };

struct Operation {
    const char *name, *compare;
    Draw draw;
    int in, out;
    void (*kernel)(Params);
};

const Operation kOperations[] = {
    {"f16_add2", "exact", Draw::f16, 2, 1, f16_add2},
    {"f16_mul2", "exact", Draw::f16, 2, 1, f16_mul2},
    {"f16_fma2", "exact", Draw::f16, 3, 1, f16_fma2},
    {"f16_to_float", "exact", Draw::f16, 1, 1, f16_to_float},
    {"f16_from_float", "exact", Draw::f32, 1, 1, f16_from_float},
    {"bf16_add2", "exact", Draw::bf16, 2, 1, bf16_add2},
    {"bf16_mul2", "exact", Draw::bf16, 2, 1, bf16_mul2},
    {"bf16_fma2", "exact", Draw::bf16, 3, 1, bf16_fma2},
    {"bf16_to_float", "exact", Draw::bf16, 1, 1, bf16_to_float},
    {"bf16_from_float", "exact", Draw::f32, 1, 1, bf16_from_float},
    {"f32_add", "exact", Draw::f32, 2, 1, f32_add},
    {"f32_mul", "exact", Draw::f32, 2, 1, f32_mul},
    {"f32_fma", "exact", Draw::f32, 3, 1, f32_fma},
    {"f32_div", "exact", Draw::f32, 2, 1, f32_div},
    {"f32_exponential", "ulp2", Draw::f32, 1, 1, f32_exponential},
    {"f32_rint_to_int", "exact", Draw::f32, 1, 1, f32_rint_to_int},
    {"int_to_float", "exact", Draw::any, 1, 1, int_to_float},
    {"and_or", "exact", Draw::any, 3, 1, and_or_bits},
    {"mma_f16_integers", "exact", Draw::f16_integers, 10, 4, mma_float<F16>},
    {"mma_bf16_integers", "exact", Draw::bf16_integers, 10, 4, mma_float<BF16>},
    {"mma_f16", "sum", Draw::f16_products, 10, 4, mma_float<F16>},
    {"mma_bf16", "sum", Draw::bf16_products, 10, 4, mma_float<BF16>},
    {"mma_s8", "exact", Draw::any, 10, 4, mma_int8},
    {"shuffle_xor", "exact", Draw::any, 1, 6, shuffles},
    {"ldmatrix4", "exact", Draw::any, 5, 4, matrices},
    {"shared", "exact", Draw::any, 5, 7, shared_words},
    {"cp_async", "exact", Draw::any, 3, 8, copies},
    {"cp_async8", "exact", Draw::any, 2, 2, small_copies},
    {"wide_loads", "exact", Draw::any, 6, 8, wide_loads},
    {"narrow_loads", "exact", Draw::any, 1, 8, narrow_loads},
    {"stores", "exact", Draw::any, 4, 7, stores},
    {"tickets", "exact", Draw::any, 0, 3, tickets},
    {"places", "exact", Draw::any, 0, 9, places},
};

uint64_t mixed(uint64_t v) {  // splitmix64
    v += 0x9E3779B97F4A7C15u;
    v = (v ^ (v >> 30)) * 0xBF58476D1CE4E5B9u;
    v = (v ^ (v >> 27)) * 0x94D049BB133111EBu;
    return v ^ (v >> 31);
}

// A 16-bit number with `mantissa` stored bits: an edge value, any bits, or, half of the time, near one.
uint32_t drawn_16(uint64_t random, int mantissa) {
    const uint32_t bits = random & 0xFFFF, fraction = (1u << mantissa) - 1, one = (0x7FFFu >> (mantissa + 1)) << mantissa;
    const uint32_t edges[8] = {0, 1, fraction, fraction + 1, one, one + 1, 0x7FFFu & ~fraction, (0x7FFFu & ~fraction) - 1};
    const uint32_t choice = (random >> 16) & 7;
    if (choice == 0) return edges[bits & 7] | (bits & 0x8000);
    if (choice < 4) return bits;
    return (bits & (0x8000 | fraction)) | (one + (((bits >> mantissa) & 7) << mantissa) - (4u << mantissa));
}

uint32_t drawn_32(uint64_t random) {
    const uint32_t bits = random & 0xFFFFFFFF;
    const uint32_t edges[8] = {0, 1, 0x7FFFFF, 0x800000, 0x7F800000, 0x7F7FFFFF, 0x4B000001, 0x33000000};
    const uint32_t choice = (random >> 32) & 15;
    if (choice == 0) return edges[bits & 7] | (bits & 0x80000000);
    if (choice < 4) return bits;
    if (choice == 4) return (bits & 0xC03FE000) | 0x3F001000;                 // ties of 16-bit formats
    if (choice == 5) return (bits & 0x80FF8000) | 0x38000000;                 // small for fp16
    if (choice < 8) return (bits & 0x80600000) | 0x40200000;                  // 2.5, 3.5, ...: ties of integers
    return (bits & 0x807FFFFF) | (123 + ((bits >> 23) & 7)) << 23;
}

// A small integer, -8 .. 7, in a 16-bit format: sums of products are exact in any order.
uint32_t small_integer(uint64_t random, int mantissa) {
    const int value = static_cast<int>(random & 15) - 8;
    uint32_t exponent = 0, magnitude = static_cast<uint32_t>(value < 0 ? -value : value);
    if (magnitude == 0) return 0;
    while (magnitude >> (exponent + 1)) ++exponent;
    const uint32_t bias = 0x7FFFu >> (mantissa + 1), fraction = (magnitude << mantissa >> exponent) & ((1u << mantissa) - 1);
    return (value < 0 ? 0x8000u : 0) | (bias + exponent) << mantissa | fraction;
}

uint32_t drawn(Draw draw, uint64_t random, int operand) {
    const auto pair = [&](auto half) { return half(random) | half(random >> 20) << 16; };
    const bool is_c = operand >= 6;
    switch (draw) {
        case Draw::f16: return pair([](uint64_t r) { return drawn_16(r, 10); });
        case Draw::bf16: return pair([](uint64_t r) { return drawn_16(r, 7); });
        case Draw::f32: return drawn_32(random);
        case Draw::f16_integers: return is_c ? 0x42280000 : pair([](uint64_t r) { return small_integer(r, 10); });
        case Draw::bf16_integers: return is_c ? 0xC2280000 : pair([](uint64_t r) { return small_integer(r, 7); });
        case Draw::f16_products:
        case Draw::bf16_products: {
            const int mantissa = draw == Draw::f16_products ? 10 : 7;
            if (is_c) return (random & 0x807FFFFF) | (123 + ((random >> 23) & 7)) << 23;
            return pair([&](uint64_t r) { return drawn_16((r & ~uint64_t{0x70000}) | 0x50000, mantissa); });
        }
        default: return static_cast<uint32_t>(random);
    }
}

[[noreturn]] void stop(const char *name, const char *why) {
    std::fprintf(stderr, "conformance: %s: %s\n", name, why);
    std::exit(1);
}

void check(const char *name, int status) {
    if (status == 0) return;
#if defined(MBQ_EMULATION)
    stop(name, mbq_emulation_message());
#else
    stop(name, cuda_error_text(status));
#endif
}

// Run one operation on `in`; fills `out`.
void run(const Operation &operation, const std::vector<uint32_t> &in, std::vector<uint32_t> &out) {
    const size_t in_bytes = in.size() * 4, out_bytes = out.size() * 4;
    const Grid grid{kBlocks, 1, 1};
#if defined(MBQ_EMULATION)
    check(operation.name, mbq_emulation_register(in.data(), in_bytes, 0));
    check(operation.name, mbq_emulation_register(out.data(), out_bytes, 1));
    check(operation.name, zero_async(out.data(), out_bytes, nullptr));
    check(operation.name, launch<Params>(operation.kernel, grid, kBlockThreads, kSharedBytes, nullptr,
                                         Params{in.data(), out.data()}));
#else
    static uint32_t *device_in = nullptr, *device_out = nullptr;
    if (device_in == nullptr) check("cudaMalloc", cudaMalloc(&device_in, in_bytes));
    if (device_out == nullptr) check("cudaMalloc", cudaMalloc(&device_out, out_bytes));
    check("cudaMemcpy", cudaMemcpy(device_in, in.data(), in_bytes, cudaMemcpyHostToDevice));
    check(operation.name, zero_async(device_out, out_bytes, nullptr));
    check(operation.name, launch<Params>(operation.kernel, grid, kBlockThreads, kSharedBytes, nullptr,
                                         Params{device_in, device_out}));
    check(operation.name, cudaMemcpy(out.data(), device_out, out_bytes, cudaMemcpyDeviceToHost));
#endif
}

void print_words(const char *label, int j, const uint32_t *words) {
    std::printf("%s %d", label, j);
    for (int t = 0; t < kThreads; ++t) std::printf(" %x", words[t]);
    std::printf("\n");
}

}  // namespace

int main(int count, char **arguments) {
    const uint64_t seed = count > 1 ? std::strtoull(arguments[1], nullptr, 10) : 1;
    std::vector<uint32_t> in(kMaxIn * kThreads), out(kMaxOut * kThreads);
    std::printf("conformance 1 seed %llu\n", static_cast<unsigned long long>(seed));
    uint64_t at = seed << 32;
    for (const Operation &operation : kOperations) {
        for (size_t i = 0; i < in.size(); ++i)
            in[i] = drawn(operation.draw, mixed(at++), static_cast<int>(i) / kThreads);
        run(operation, in, out);
        std::printf("operation %s %s\n", operation.name, operation.compare);
        for (int j = 0; j < operation.in; ++j) print_words("in", j, &in[static_cast<size_t>(j * kThreads)]);
        for (int j = 0; j < operation.out; ++j) print_words("out", j, &out[static_cast<size_t>(j * kThreads)]);
    }
    return 0;
}
