#include "w4a16_linear/plugin.h"

#include "common/plugin_base.h"

namespace mbq {

nvinfer1::IPluginCreatorInterface *w4a16_linear_creator() {
    static LinearCreator<W4A16Linear> creator;
    return &creator;
}

}  // namespace mbq
