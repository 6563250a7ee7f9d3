// W3Linear: 3-bit weights in groups, 16-bit activations.
#pragma once

#include "common/tensorrt.h"
#include "common/op_names.h"

namespace mbq {

struct W3Linear {
    static constexpr const OpFacts &kFacts = kW3Linear;
};

// The library's one creator of this operator.
nvinfer1::IPluginCreatorInterface *w3_linear_creator();

}  // namespace mbq
