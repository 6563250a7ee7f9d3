#include "w4a8_linear/plugin.h"

#include "common/plugin_base.h"

namespace mbq {

nvinfer1::IPluginCreatorInterface *w4a8_linear_creator() {
    static LinearCreator<W4A8Linear> creator;
    return &creator;
}

}  // namespace mbq
