// What a plugin registry looks up in the library: two C functions, and nothing else is visible (exports.map).
#include <cstdint>

#include "common/op_names.h"
#include "common/tensorrt.h"
#include "mbq/layout.h"
#include "mbq/mbq.h"
#include "w3_linear/plugin.h"
#include "w4a16_linear/plugin.h"
#include "w4a8_linear/plugin.h"

namespace {

// A JSON object, padded with zeros, that tools read in the file before they load it.
struct Record {
    char text[128] = {};
    int size = 0;

    constexpr Record &add(const char *more) {
        while (*more != '\0') text[size++] = *more++;
        return *this;
    }
    constexpr Record &add(const char *name, int number) {
        add(name);
        if (number >= 10) text[size++] = static_cast<char>('0' + number / 10);
        text[size++] = static_cast<char>('0' + number % 10);
        return *this;
    }
};

struct Text {
    char characters[sizeof Record::text];
};

constexpr Text record_text() {
    const Record record = Record{}
                              .add("{\"abi\":", mbq::kPluginAbi)
                              .add(",\"kernel_abi\":", MBQ_ABI)
                              .add(",\"layout_version\":", MBQ_LAYOUT_VERSION)
                              .add(",\"trt_headers\":\"" MBQ_TRT_HEADERS "\"}");
    Text text{};
    for (int i = 0; i < record.size; ++i) text.characters[i] = record.text[i];
    return text;
}

}  // namespace

__attribute__((used, section(".mbq_plugin"))) constexpr Text mbq_plugin_record = record_text();

extern "C" {

MBQ_API nvinfer1::IPluginCreatorInterface *const *getCreators(int32_t &count) {
    static nvinfer1::IPluginCreatorInterface *const creators[] = {
        mbq::w3_linear_creator(), mbq::w4a16_linear_creator(), mbq::w4a8_linear_creator()};
    count = sizeof creators / sizeof creators[0];
    return creators;
}

// Registries insist on it. The argument's vtable differs between TensorRT 10 and 11, so it is not touched.
MBQ_API void setLoggerFinder(nvinfer1::ILoggerFinder *) {}

}  // extern "C"
