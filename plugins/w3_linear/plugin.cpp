#include "w3_linear/plugin.h"

#include "common/plugin_base.h"

namespace mbq {

nvinfer1::IPluginCreatorInterface *w3_linear_creator() {
    static LinearCreator<W3Linear> creator;
    return &creator;
}

}  // namespace mbq
