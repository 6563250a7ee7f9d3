// Linears of every operator, small, with arbitrary weights: for checks that do not look at the numbers.
#pragma once

#include <random>

#include "linear.h"

struct Wish {
    const mbq::OpFacts *op;
    DataType type = DataType::kHALF;
    int32_t n = 48, k = 256, group = 128, m = 3;
    bool bias = false;
};

inline std::vector<uint8_t> arbitrary_bytes(size_t count) {
    std::mt19937 generator(static_cast<unsigned>(count));
    std::vector<uint8_t> bytes(count);
    for (uint8_t &byte : bytes) byte = static_cast<uint8_t>(generator() & 0x3f);  // no exponent is all ones
    return bytes;
}

inline Linear example(const Wish &wish) {
    const mbq::OpFacts &op = *wish.op;
    const int64_t n_tiles = (wish.n + 15) / 16, k_tiles = (wish.k + 127) / 128;
    const int64_t groups = wish.group == 0 ? 0 : k_tiles * (128 / wish.group);
    Linear linear;
    linear.op = op.name;
    const std::pair<const char *, int32_t> values[] = {
        {mbq::kFieldN, wish.n},           {mbq::kFieldK, wish.k},
        {mbq::kFieldGroupSize, wish.group}, {mbq::kFieldBits, op.bits},
        {mbq::kFieldLayoutVersion, op.layout_version}, {mbq::kFieldHasBias, wish.bias},
        {mbq::kFieldEpilogue, 0},         {mbq::kFieldActBits, op.act_bits}};
    for (const auto &[name, value] : values) linear.fields[name] = value;
    linear.inputs.push_back({dims_of({1, wish.m, wish.k}), wish.type});
    linear.inputs.push_back({dims_of({n_tiles, k_tiles, op.tile_words}), DataType::kINT32});
    if (wish.group == 0)
        linear.inputs.push_back({dims_of({n_tiles * 16}), DataType::kFLOAT});
    else
        linear.inputs.push_back({dims_of({n_tiles, groups, 8, 2}), DataType::kHALF});
    if (op.has_zeros) linear.inputs.push_back({dims_of({n_tiles, groups, 2}), DataType::kINT32});
    if (wish.bias) linear.inputs.push_back({dims_of({wish.n}), wish.type});
    linear.output = {dims_of({1, wish.m, wish.n}), wish.type};
    for (const Tensor &each : linear.inputs) linear.contents.push_back(arbitrary_bytes(each.bytes()));
    return linear;
}

// Every operator, both types, with and without bias, groups and channels.
inline std::vector<Linear> all_examples() {
    std::vector<Linear> found;
    for (const mbq::OpFacts &op : mbq::kOps)
        for (const DataType type : {DataType::kHALF, DataType::kBF16})
            for (const bool bias : {false, true})
                for (const int32_t group : {0, 32, 64, 128}) {
                    if ((group == 0 && op.has_zeros) || (group % 128 != 0 && !op.has_zeros)) continue;
                    found.push_back(example({&op, type, 48, 256, group, 3, bias}));
                }
    return found;
}
