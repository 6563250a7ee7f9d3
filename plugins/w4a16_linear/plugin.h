// W4A16Linear: 4-bit weights in groups, 16-bit activations.
#pragma once

#include "common/tensorrt.h"
#include "common/op_names.h"

namespace mbq {

struct W4A16Linear {
    static constexpr const OpFacts &kFacts = kW4A16Linear;
};

// The library's one creator of this operator.
nvinfer1::IPluginCreatorInterface *w4a16_linear_creator();

}  // namespace mbq
