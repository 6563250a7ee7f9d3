// One linear of one operator: its fields, its tensors, and a plugin taken through its life the way a runtime does it.
#pragma once

#include <NvInferRuntime.h>

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "common/op_names.h"
#include "memory.h"

using nvinfer1::DataType;
using nvinfer1::Dims;

struct Tensor {
    Dims dims{};
    DataType type{};

    size_t bytes() const {
        size_t count = 1;
        for (int i = 0; i < dims.nbDims; ++i) count *= static_cast<size_t>(dims.d[i]);
        return count * (type == DataType::kFLOAT || type == DataType::kINT32 ? 4 : 2);
    }
    nvinfer1::PluginTensorDesc described() const { return {dims, type, nvinfer1::TensorFormat::kLINEAR, 1.F}; }
};

inline Dims dims_of(std::initializer_list<int64_t> sizes) {
    Dims dims{};
    for (const int64_t size : sizes) dims.d[dims.nbDims++] = size;
    return dims;
}

// Fields in the form of a plugin registry; may be bent out of shape for tests.
struct Fields {
    std::vector<std::pair<std::string, int32_t>> values;

    int32_t &operator[](const std::string &name) {
        for (auto &[key, value] : values)
            if (key == name) return value;
        values.emplace_back(name, 0);
        return values.back().second;
    }
    std::vector<nvinfer1::PluginField> as_plugin_fields() const {
        std::vector<nvinfer1::PluginField> fields;
        for (const auto &[key, value] : values)
            fields.emplace_back(key.c_str(), &value, nvinfer1::PluginFieldType::kINT32, 1);
        return fields;
    }
    bool operator==(const Fields &other) const { return values == other.values; }
};

struct Linear {
    std::string op;
    Fields fields;
    std::vector<Tensor> inputs;
    Tensor output;
    std::vector<std::vector<uint8_t>> contents;  // of the inputs

    std::vector<nvinfer1::PluginTensorDesc> input_tensors() const {
        std::vector<nvinfer1::PluginTensorDesc> found;
        for (const Tensor &each : inputs) found.push_back(each.described());
        return found;
    }
    // As of an optimization profile whose smallest and largest shapes are these.
    static nvinfer1::DynamicPluginTensorDesc range(const Tensor &tensor) {
        return {tensor.described(), tensor.dims, tensor.dims, tensor.dims};
    }
    std::vector<nvinfer1::DynamicPluginTensorDesc> ranges() const {
        std::vector<nvinfer1::DynamicPluginTensorDesc> found;
        for (const Tensor &each : inputs) found.push_back(range(each));
        found.push_back(range(output));
        return found;
    }
};

using Plugin = std::unique_ptr<nvinfer1::IPluginV3>;

inline auto *build_part(const Plugin &plugin) {
    return static_cast<nvinfer1::IPluginV3OneBuild *>(
        plugin->getCapabilityInterface(nvinfer1::PluginCapabilityType::kBUILD));
}
inline auto *core_part(const Plugin &plugin) {
    return static_cast<nvinfer1::IPluginV3OneCore *>(
        plugin->getCapabilityInterface(nvinfer1::PluginCapabilityType::kCORE));
}
inline auto *runtime_part(const Plugin &plugin) {
    return static_cast<nvinfer1::IPluginV3OneRuntime *>(
        plugin->getCapabilityInterface(nvinfer1::PluginCapabilityType::kRUNTIME));
}

// What a plugin writes into an engine.
inline Fields serialized(const Plugin &plugin) {
    const nvinfer1::PluginFieldCollection *written = runtime_part(plugin)->getFieldsToSerialize();
    Fields found;
    for (int i = 0; i < written->nbFields; ++i) {
        int32_t value;
        std::memcpy(&value, written->fields[i].data, sizeof value);
        found.values.emplace_back(written->fields[i].name, value);
    }
    return found;
}

// A loaded plugin library.
class Library {
   public:
    explicit Library(const char *path) : handle_(dlopen(path, RTLD_NOW | RTLD_LOCAL)) {
        if (handle_ == nullptr) {
            std::printf("FAILED dlopen: %s\n", dlerror());
            std::exit(1);
        }
        using GetCreators = nvinfer1::IPluginCreatorInterface *const *(int32_t &);
        auto *const get = reinterpret_cast<GetCreators *>(dlsym(handle_, "getCreators"));
        auto *const set_finder = reinterpret_cast<void (*)(void *)>(dlsym(handle_, "setLoggerFinder"));
        if (get == nullptr || set_finder == nullptr) {
            std::printf("FAILED an export is missing\n");
            std::exit(1);
        }
        set_finder(&count_);  // no logger finder at all: the library must not touch it
        creators_ = get(count_);
    }

    std::vector<nvinfer1::IPluginCreatorV3One *> creators() const {
        std::vector<nvinfer1::IPluginCreatorV3One *> found;
        for (int i = 0; i < count_; ++i) found.push_back(static_cast<nvinfer1::IPluginCreatorV3One *>(creators_[i]));
        return found;
    }

    nvinfer1::IPluginCreatorV3One *creator(const std::string &op) const {
        for (auto *each : creators())
            if (op == each->getPluginName()) return each;
        std::printf("FAILED there is no creator of %s\n", op.c_str());
        std::exit(1);
    }

    Plugin create(const std::string &op, const std::vector<nvinfer1::PluginField> &fields,
                  nvinfer1::TensorRTPhase phase) const {
        const nvinfer1::PluginFieldCollection given{static_cast<int32_t>(fields.size()), fields.data()};
        return Plugin(creator(op)->createPlugin("node", &given, phase));
    }

    void *handle() const { return handle_; }

   private:
    void *handle_;
    int32_t count_ = 0;
    nvinfer1::IPluginCreatorInterface *const *creators_ = nullptr;
};
