// W4A8Linear: Signed 4-bit weights, activations rounded to int8 per token; sums are exact integers.
#pragma once

#include "common/tensorrt.h"
#include "common/op_names.h"

namespace mbq {

struct W4A8Linear {
    static constexpr const OpFacts &kFacts = kW4A8Linear;
};

// The library's one creator of this operator.
nvinfer1::IPluginCreatorInterface *w4a8_linear_creator();

}  // namespace mbq
