// What the plugins decide, by numbers a reader can check; needs neither TensorRT nor CUDA.
#include "common/linear_spec.h"

#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/guarded.h"
#include "expect.h"

using namespace mbq;

namespace {

constexpr int32_t kW3Values[] = {48, 256, 128, 3, 1, 1, 0, 16};  // in the order of kFields

std::vector<Field> fields_of(const int32_t *values) {
    std::vector<Field> fields;
    for (int i = 0; i < kFieldCount; ++i) fields.push_back({kFields[i], true, 1, values + i});
    return fields;
}

LinearSpec spec_of(const OpFacts &op, int32_t n, int32_t k, int32_t group, bool bias, int32_t epilogue = 0) {
    const int32_t values[] = {n, k, group, op.bits, op.layout_version, bias, epilogue, op.act_bits};
    const std::vector<Field> fields = fields_of(values);
    LinearSpec spec;
    const Reason reason = parse_fields(op, fields.data(), kFieldCount, false, &spec);
    if (reason) std::printf("%s\n", reason.text);
    EXPECT(!reason);
    return spec;
}

bool says(const Reason &reason, const char *text) { return std::strstr(reason.text, text) != nullptr; }

bool is(const Shape &shape, std::vector<int64_t> sizes) {
    if (shape.rank != static_cast<int>(sizes.size())) return false;
    for (int i = 0; i < shape.rank; ++i)
        if (shape.d[i] != sizes[static_cast<size_t>(i)]) return false;
    return true;
}

void fields_reach_their_places() {
    const LinearSpec spec = spec_of(kW3Linear, 48, 256, 64, true);
    EXPECT(spec.n == 48 && spec.k == 256 && spec.group_size == 64 && spec.bits == 3 && spec.layout_version == 1);
    EXPECT(spec.has_bias == 1 && spec.epilogue == 0 && spec.act_bits == 16);
    char text[128];
    describe(kW3Linear, spec, text, sizeof text);
    EXPECT(std::string(text) == "W3Linear N=48;K=256;group_size=64;bits=3;layout_version=1;has_bias=1;epilogue=0;act_bits=16");
    describe(kW3Linear, spec, text, 20);
    EXPECT(std::string(text) == "W3Linear N=48;K=256");
}

void the_order_of_fields_does_not_matter_and_others_are_ignored() {
    std::vector<Field> fields = fields_of(kW3Values);
    std::swap(fields.front(), fields.back());
    static const int32_t more[3] = {};
    fields.push_back({"something_new", false, 3, more});
    LinearSpec spec;
    EXPECT(!parse_fields(kW3Linear, fields.data(), kFieldCount + 1, false, &spec));
    EXPECT(spec.n == 48 && spec.act_bits == 16);
}

void an_engine_says_its_abi() {
    std::vector<Field> fields = fields_of(kW3Values);
    LinearSpec spec;
    EXPECT(says(parse_fields(kW3Linear, fields.data(), kFieldCount, true, &spec), "field abi is missing"));
    const int32_t newer = kPluginAbi + 1;
    fields.push_back({kAbiField, true, 1, &newer});
    EXPECT(says(parse_fields(kW3Linear, fields.data(), kFieldCount + 1, true, &spec), "plugin ABI 2, this library 1"));
    EXPECT(!parse_fields(kW3Linear, fields.data(), kFieldCount + 1, false, &spec));
}

Reason refusal(const OpFacts &op, int field, int32_t value) {
    int32_t values[] = {48, 256, 128, op.bits, op.layout_version, 0, 0, op.act_bits};
    values[field] = value;
    const std::vector<Field> fields = fields_of(values);
    LinearSpec spec;
    return parse_fields(op, fields.data(), kFieldCount, false, &spec);
}

void values_out_of_range_are_named() {
    enum { kN, kK, kGroup, kBits, kLayout, kBias, kEpilogue, kActBits };
    EXPECT(!refusal(kW3Linear, kN, 1));
    EXPECT(says(refusal(kW3Linear, kN, 0), "N=0"));
    EXPECT(says(refusal(kW3Linear, kK, 100), "multiple of 8"));
    EXPECT(says(refusal(kW3Linear, kGroup, 96), "group size"));
    EXPECT(says(refusal(kW3Linear, kGroup, 0), "group size"));
    EXPECT(!refusal(kW3Linear, kGroup, 32));
    EXPECT(!refusal(kW4A8Linear, kGroup, 0));
    EXPECT(says(refusal(kW4A8Linear, kGroup, 32), "group size"));
    EXPECT(says(refusal(kW4A8Linear, kK, 1 << 20), "scheme's limit"));
    EXPECT(says(refusal(kW3Linear, kBits, 4), "bits is 4, not 3"));
    EXPECT(says(refusal(kW3Linear, kLayout, 2), "layout version 2, this library reads 1"));
    EXPECT(says(refusal(kW3Linear, kBias, 2), "has_bias is 2"));
    EXPECT(says(refusal(kW3Linear, kEpilogue, 2), "epilogue"));
    EXPECT(says(refusal(kW3Linear, kEpilogue, 1), "multiple of 32"));  // N = 48
    EXPECT(says(refusal(kW4A8Linear, kActBits, 16), "act_bits is 16, not 8"));
}

void constants_have_the_shapes_and_types_of_the_graph() {
    const LinearSpec w3 = spec_of(kW3Linear, 40, 192, 64, true);  // 3 x 2 tiles of 16 x 128, the last ones padded
    EXPECT(input_count(kW3Linear, w3) == 5);
    EXPECT(is(constant_shape(kW3Linear, w3, 1), {3, 2, 192}));
    EXPECT(is(constant_shape(kW3Linear, w3, 2), {3, 4, 8, 2}));
    EXPECT(is(constant_shape(kW3Linear, w3, 3), {3, 4, 2}));
    EXPECT(is(constant_shape(kW3Linear, w3, 4), {40}));
    EXPECT(constant_element(kW3Linear, w3, 1, Element::kBFloat16) == Element::kInt32);
    EXPECT(constant_element(kW3Linear, w3, 2, Element::kBFloat16) == Element::kHalf);
    EXPECT(constant_element(kW3Linear, w3, 3, Element::kBFloat16) == Element::kInt32);
    EXPECT(constant_element(kW3Linear, w3, 4, Element::kBFloat16) == Element::kBFloat16);

    const LinearSpec channel = spec_of(kW4A8Linear, 40, 192, 0, true);
    EXPECT(input_count(kW4A8Linear, channel) == 4);
    EXPECT(is(constant_shape(kW4A8Linear, channel, 1), {3, 2, 256}));
    EXPECT(is(constant_shape(kW4A8Linear, channel, 2), {48}));
    EXPECT(is(constant_shape(kW4A8Linear, channel, 3), {40}));
    EXPECT(constant_element(kW4A8Linear, channel, 2, Element::kHalf) == Element::kFloat);
    const LinearSpec grouped = spec_of(kW4A8Linear, 40, 256, 128, false);
    EXPECT(is(constant_shape(kW4A8Linear, grouped, 2), {3, 2, 8, 2}));
    EXPECT(constant_element(kW4A8Linear, grouped, 2, Element::kHalf) == Element::kHalf);
}

void rows_are_the_product_of_all_but_the_last_size() {
    EXPECT(rows_of({3, {2, 5, 64}}) == 10);
    EXPECT(rows_of({1, {64}}) == 1);
    EXPECT(rows_of({2, {0, 64}}) == 0);
    EXPECT(rows_of({3, {0, 1 << 30, 64}}) == 0 && rows_of({4, {1 << 30, 1 << 30, 0, 64}}) == -1);
    EXPECT(rows_of({3, {-1, 5, 64}}) == -1);
    EXPECT(rows_of({3, {1 << 16, 1 << 16, 64}}) == -1);
    EXPECT(rows_of({2, {int64_t{1} << 40, 64}}) == -1);
    EXPECT(rows_of({0, {}}) == -1 && rows_of({9, {}}) == -1 && rows_of({-1, {}}) == -1);
}

void shapes_are_compared_one_by_one() {
    const LinearSpec spec = spec_of(kW3Linear, 40, 192, 64, false);
    const Shape good[] = {{3, {1, 7, 192}}, {3, {3, 2, 192}}, {4, {3, 4, 8, 2}}, {3, {3, 4, 2}}};
    EXPECT(!check_shapes(kW3Linear, spec, good, 4));
    EXPECT(says(check_shapes(kW3Linear, spec, good, 3), "3 inputs, expected 4"));
    Shape bad[] = {good[0], good[1], good[2], good[3]};
    bad[0].d[2] = 191;
    EXPECT(says(check_shapes(kW3Linear, spec, bad, 4), "x has 191 columns, expected K = 192"));
    bad[0] = {0, {}};
    EXPECT(says(check_shapes(kW3Linear, spec, bad, 4), "x has -1 columns"));
    bad[0] = good[0];
    bad[2].d[0] = 4;
    EXPECT(says(check_shapes(kW3Linear, spec, bad, 4), "input 2 has rank 4 and size 4 first, expected rank 4 and 3"));
}

void scratch_never_shrinks_as_rows_grow() {
    for (const OpFacts &op : kOps) {
        const LinearSpec spec = spec_of(op, 4096, 4096, 128, false);
        size_t before = 0;
        for (int32_t rows = 1; rows <= 600; ++rows) {
            const size_t bytes = workspace_bytes(op, spec, Element::kHalf, rows);
            EXPECT(bytes >= before && bytes % 256 == 0);
            const MbqLinear call = kernel_call(op, spec, Element::kHalf, nullptr);
            EXPECT(bytes >= mbq_linear_workspace(&call, rows));
            before = bytes;
        }
    }
    // int8 activations alone: 600 rows of 4096 bytes.
    EXPECT(workspace_bytes(kW4A8Linear, spec_of(kW4A8Linear, 4096, 4096, 128, false), Element::kHalf, 600) > 600 * 4096);
    EXPECT(workspace_bytes(kW3Linear, spec_of(kW3Linear, 4096, 4096, 128, false), Element::kFloat, 1) == 0);
}

void the_kernels_get_what_the_fields_say() {
    const char memory[5] = {};
    const void *const inputs[] = {memory, memory + 1, memory + 2, memory + 3, memory + 4};
    const MbqLinear w3 = kernel_call(kW3Linear, spec_of(kW3Linear, 64, 256, 128, true, 1), Element::kBFloat16, inputs);
    EXPECT(w3.struct_size == sizeof w3 && w3.scheme == MBQ_W3A16 && w3.layout_version == 1 && w3.dtype == MBQ_BF16);
    EXPECT(w3.n == 64 && w3.k == 256 && w3.group == 128 && w3.epilogue == MBQ_EPILOGUE_SILU_MUL && w3.flags == 0);
    EXPECT(w3.codes == memory + 1 && w3.scales == memory + 2 && w3.zeros == memory + 3 && w3.bias == memory + 4);
    EXPECT(w3.residual == nullptr);
    EXPECT(output_columns(spec_of(kW3Linear, 64, 256, 128, true, 1)) == 32);
    EXPECT(output_columns(spec_of(kW3Linear, 64, 256, 128, true, 0)) == 64);
    const MbqLinear w4a8 = kernel_call(kW4A8Linear, spec_of(kW4A8Linear, 64, 256, 0, true), Element::kHalf, inputs);
    EXPECT(w4a8.scheme == MBQ_W4A8 && w4a8.zeros == nullptr && w4a8.bias == memory + 3 && w4a8.dtype == MBQ_F16);
    const MbqLinear plain = kernel_call(kW4A8Linear, spec_of(kW4A8Linear, 64, 256, 0, false), Element::kHalf, inputs);
    EXPECT(plain.bias == nullptr);
}

void an_exception_ends_at_the_guard() {
    EXPECT(guarded("op", -1, [] { return 7; }) == 7);
    EXPECT(guarded("op", -1, []() -> int { throw std::runtime_error("planted"); }) == -1);
    EXPECT(guarded("op", false, []() -> bool { throw 5; }) == false);
}

}  // namespace

int main() {
    fields_reach_their_places();
    the_order_of_fields_does_not_matter_and_others_are_ignored();
    an_engine_says_its_abi();
    values_out_of_range_are_named();
    constants_have_the_shapes_and_types_of_the_graph();
    rows_are_the_product_of_all_but_the_last_size();
    shapes_are_compared_one_by_one();
    scratch_never_shrinks_as_rows_grow();
    the_kernels_get_what_the_fields_say();
    an_exception_ends_at_the_guard();
    return verdict();
}
