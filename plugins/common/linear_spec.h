// Everything a plugin decides that needs no TensorRT type: which fields are right, which shapes, how much scratch, and
// what the kernels are called with.
#pragma once

#include <cstddef>
#include <cstdint>

#include "mbq/mbq.h"
#include "op_names.h"

namespace mbq {

// Why something was refused; empty if it was not.
struct Reason {
    char text[192] = "";

    explicit operator bool() const { return text[0] != '\0'; }
    // As printf; what does not fit is cut.
    [[gnu::format(printf, 1, 2)]] static Reason of(const char *format, ...);
};

// A named value as a host hands it over.
struct Field {
    const char *name;
    bool is_int32;
    int32_t length;   // of the array behind `data`
    const void *data; // length 32-bit integers if is_int32
};

enum class Element { kHalf, kBFloat16, kFloat, kInt32, kOther };

constexpr int kMostDimensions = 8;

struct Shape {
    int rank = 0;
    int64_t d[kMostDimensions] = {};
};

// The fields of one linear, checked.
struct LinearSpec {
    int32_t n = 0;              // output features, not padded
    int32_t k = 0;              // input features, not padded
    int32_t group_size = 0;     // columns that share a scale; 0: one scale per output channel
    int32_t bits = 0;
    int32_t layout_version = 0; // of the tiles
    int32_t has_bias = 0;
    int32_t epilogue = 0;       // MBQ_EPILOGUE_...
    int32_t act_bits = 0;
};

// Where each field of `kFields` lies; fields are read and written by this table alone.
struct FieldPlace {
    const char *name;
    int32_t LinearSpec::*member;
};
constexpr FieldPlace kFieldPlaces[] = {
    {kFieldN, &LinearSpec::n},
    {kFieldK, &LinearSpec::k},
    {kFieldGroupSize, &LinearSpec::group_size},
    {kFieldBits, &LinearSpec::bits},
    {kFieldLayoutVersion, &LinearSpec::layout_version},
    {kFieldHasBias, &LinearSpec::has_bias},
    {kFieldEpilogue, &LinearSpec::epilogue},
    {kFieldActBits, &LinearSpec::act_bits},
};
static_assert(sizeof kFieldPlaces / sizeof kFieldPlaces[0] == kFieldCount, "a field of op_names.h has no place");

// Read the fields of an operator. Each must be there once, a single 32-bit integer, and all together something that the
// kernels take; others are ignored. An engine's fields hold `kAbiField` too, a graph's do not.
Reason parse_fields(const OpFacts &op, const Field *fields, int count, bool from_engine, LinearSpec *spec);

// All fields in one line, also the key of the timing cache: "W3Linear N=64;K=256;...".
void describe(const OpFacts &op, const LinearSpec &spec, char *text, size_t bytes);

int input_count(const OpFacts &op, const LinearSpec &spec);

// Columns of y: half of N where gate and up are multiplied.
int32_t output_columns(const LinearSpec &spec);

// Shape and type of an input that is a constant of the graph; `position` 1 .. input_count - 1.
Shape constant_shape(const OpFacts &op, const LinearSpec &spec, int position);
Element constant_element(const OpFacts &op, const LinearSpec &spec, int position, Element activation);

// Product of the leading dimensions; -1 if one is negative, there are none at all, or the product leaves 31 bits.
int64_t rows_of(const Shape &x);

// Check x's last dimension, and all dimensions of the constants.
Reason check_shapes(const OpFacts &op, const LinearSpec &spec, const Shape *inputs, int count);

// Scratch for any number of rows up to this; a multiple of 256.
size_t workspace_bytes(const OpFacts &op, const LinearSpec &spec, Element activation, int32_t most_rows);

// The kernels' descriptor; `inputs` as in the graph, or null for one without pointers.
MbqLinear kernel_call(const OpFacts &op, const LinearSpec &spec, Element activation, const void *const *inputs);

}  // namespace mbq
