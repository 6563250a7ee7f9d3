#include "linear_spec.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "mbq/layout.h"

namespace mbq {
namespace {

constexpr bool same_text(const char *a, const char *b) {
    while (*a != '\0' && *a == *b) ++a, ++b;
    return *a == *b;
}

constexpr bool places_follow_fields() {
    for (int i = 0; i < kFieldCount; ++i)
        if (!same_text(kFieldPlaces[i].name, kFields[i])) return false;
    return true;
}
static_assert(places_follow_fields(), "the table of places and kFields of op_names.h differ");
static_assert(kW3Linear.scheme == MBQ_W3A16 && kW4A16Linear.scheme == MBQ_W4A16 && kW4A8Linear.scheme == MBQ_W4A8,
              "op_names.h numbers the schemes as mbq.h does");

constexpr int kOldestSm = 80;
constexpr int64_t kLargestInt32 = 0x7fffffff;

int64_t tiles(int32_t size, int32_t across) { return (int64_t{size} + across - 1) / across; }

// The one value of a name, or why there is none.
Reason read_field(const Field *fields, int count, const char *name, int32_t *value) {
    const Field *found = nullptr;
    for (int i = 0; i < count; ++i) {
        if (fields[i].name == nullptr) return Reason::of("a field has no name");
        if (std::strcmp(fields[i].name, name) != 0) continue;
        if (found != nullptr) return Reason::of("field %s is there twice", name);
        found = &fields[i];
    }
    if (found == nullptr) return Reason::of("field %s is missing", name);
    if (!found->is_int32 || found->length != 1 || found->data == nullptr)
        return Reason::of("field %s is not one 32-bit integer", name);
    std::memcpy(value, found->data, sizeof *value);
    return {};
}

Reason check_values(const OpFacts &op, const LinearSpec &spec) {
    if (spec.bits != op.bits) return Reason::of("bits is %d, not %d", spec.bits, op.bits);
    if (spec.act_bits != op.act_bits) return Reason::of("act_bits is %d, not %d", spec.act_bits, op.act_bits);
    if (spec.layout_version != op.layout_version)
        return Reason::of("tiles of layout version %d, this library reads %d", spec.layout_version, op.layout_version);
    if (spec.has_bias != 0 && spec.has_bias != 1) return Reason::of("has_bias is %d, not 0 or 1", spec.has_bias);
    if (spec.n <= 0 || spec.k <= 0 || spec.group_size < 0 || spec.epilogue < 0)
        return Reason::of("N=%d K=%d group_size=%d epilogue=%d", spec.n, spec.k, spec.group_size, spec.epilogue);
    // Group sizes, limits of K and epilogues are the kernels' business: ask them.
    const MbqLinear call = kernel_call(op, spec, Element::kHalf, nullptr);
    const int config = mbq_select(&call, 1, kOldestSm);
    return config < 0 ? Reason::of("N=%d K=%d group_size=%d epilogue=%d: %s", spec.n, spec.k, spec.group_size,
                                   spec.epilogue, mbq_status(config))
                      : Reason{};
}

}  // namespace

Reason Reason::of(const char *format, ...) {
    Reason reason;
    va_list values;
    va_start(values, format);
    std::vsnprintf(reason.text, sizeof reason.text, format, values);
    va_end(values);
    return reason;
}

Reason parse_fields(const OpFacts &op, const Field *fields, int count, bool from_engine, LinearSpec *spec) {
    for (const FieldPlace &place : kFieldPlaces)
        if (const Reason reason = read_field(fields, count, place.name, &(spec->*place.member))) return reason;
    int32_t abi = kPluginAbi;
    if (from_engine)
        if (const Reason reason = read_field(fields, count, kAbiField, &abi)) return reason;
    if (abi != kPluginAbi) return Reason::of("the engine has plugin ABI %d, this library %d", abi, kPluginAbi);
    return check_values(op, *spec);
}

void describe(const OpFacts &op, const LinearSpec &spec, char *text, size_t bytes) {
    size_t used = static_cast<size_t>(std::snprintf(text, bytes, "%s", op.name));
    char separator = ' ';
    for (const FieldPlace &place : kFieldPlaces) {
        if (used >= bytes) return;
        used += static_cast<size_t>(
            std::snprintf(text + used, bytes - used, "%c%s=%d", separator, place.name, spec.*place.member));
        separator = ';';
    }
}

int input_count(const OpFacts &op, const LinearSpec &spec) { return op.inputs + spec.has_bias; }

int32_t output_columns(const LinearSpec &spec) {
    return spec.epilogue == MBQ_EPILOGUE_SILU_MUL ? spec.n / 2 : spec.n;
}

Shape constant_shape(const OpFacts &op, const LinearSpec &spec, int position) {
    const int64_t n_tiles = tiles(spec.n, MBQ_TILE_ROWS), k_tiles = tiles(spec.k, MBQ_TILE_COLUMNS);
    if (position == 1) return {3, {n_tiles, k_tiles, op.tile_words}};
    if (position == op.inputs) return {1, {spec.n}};  // bias
    if (spec.group_size == 0) return {1, {n_tiles * MBQ_TILE_ROWS}};
    const int64_t groups = k_tiles * (MBQ_TILE_COLUMNS / spec.group_size);
    if (position == 2) return {4, {n_tiles, groups, 8, 2}};
    return {3, {n_tiles, groups, 2}};  // zeros
}

Element constant_element(const OpFacts &op, const LinearSpec &spec, int position, Element activation) {
    if (position == op.inputs) return activation;  // bias
    if (position == 2) return spec.group_size == 0 ? Element::kFloat : Element::kHalf;
    return Element::kInt32;
}

int64_t rows_of(const Shape &x) {
    if (x.rank < 1 || x.rank > kMostDimensions) return -1;
    int64_t rows = 1;
    for (int i = 0; i + 1 < x.rank; ++i) {
        if (x.d[i] < 0 || x.d[i] > kLargestInt32) return -1;
        rows *= x.d[i];
        if (rows > kLargestInt32) return -1;
    }
    return rows;
}

Reason check_shapes(const OpFacts &op, const LinearSpec &spec, const Shape *inputs, int count) {
    if (count != input_count(op, spec))
        return Reason::of("%d inputs, expected %d", count, input_count(op, spec));
    const Shape &x = inputs[0];
    if (x.rank < 1 || x.rank > kMostDimensions || x.d[x.rank - 1] != spec.k)
        return Reason::of("x has %lld columns, expected K = %d",
                          x.rank < 1 || x.rank > kMostDimensions ? -1LL : static_cast<long long>(x.d[x.rank - 1]), spec.k);
    for (int position = 1; position < count; ++position) {
        const Shape expected = constant_shape(op, spec, position);
        bool same = inputs[position].rank == expected.rank;
        for (int i = 0; same && i < expected.rank; ++i) same = inputs[position].d[i] == expected.d[i];
        if (!same)
            return Reason::of("input %d has rank %d and size %lld first, expected rank %d and %lld", position,
                              inputs[position].rank, static_cast<long long>(inputs[position].d[0]), expected.rank,
                              static_cast<long long>(expected.d[0]));
    }
    return {};
}

size_t workspace_bytes(const OpFacts &op, const LinearSpec &spec, Element activation, int32_t most_rows) {
    const MbqLinear call = kernel_call(op, spec, activation, nullptr);
    return (mbq_linear_workspace(&call, most_rows) + 255) / 256 * 256;
}

MbqLinear kernel_call(const OpFacts &op, const LinearSpec &spec, Element activation, const void *const *inputs) {
    MbqLinear call{};
    call.struct_size = sizeof call;
    call.scheme = static_cast<uint32_t>(op.scheme);
    call.layout_version = static_cast<uint32_t>(spec.layout_version);
    call.dtype = activation == Element::kHalf ? MBQ_F16 : activation == Element::kBFloat16 ? MBQ_BF16 : 0;
    call.epilogue = static_cast<uint32_t>(spec.epilogue);
    call.n = spec.n;
    call.k = spec.k;
    call.group = spec.group_size;
    if (inputs != nullptr) {
        call.codes = inputs[1];
        call.scales = inputs[2];
        call.zeros = op.has_zeros ? inputs[3] : nullptr;
        call.bias = spec.has_bias != 0 ? inputs[op.inputs] : nullptr;
    }
    return call;
}

}  // namespace mbq
