// What a plugin must refuse, and how: a null pointer or a status, never an exception, never a crash.
#pragma once

#include "examples.h"
#include "run_linear.h"

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;
using nvinfer1::TensorRTPhase;

inline bool refused(const Library &library, const Linear &linear, const std::vector<PluginField> &fields,
                    TensorRTPhase phase = TensorRTPhase::kBUILD) {
    return library.create(linear.op, fields, phase) == nullptr;
}

inline void check_bad_fields(const Library &library, const Linear &linear) {
    const std::vector<PluginField> good = linear.fields.as_plugin_fields();
    EXPECT(!refused(library, linear, good));
    static const int64_t zeros[4] = {};
    for (size_t i = 0; i < good.size(); ++i) {
        auto fields = good;
        fields.erase(fields.begin() + static_cast<long>(i));
        EXPECT(refused(library, linear, fields));  // missing
        fields = good;
        fields.push_back(good[i]);
        EXPECT(refused(library, linear, fields));  // twice
        for (const PluginField &bad :
             {PluginField(good[i].name, good[i].data, PluginFieldType::kFLOAT32, 1),
              PluginField(good[i].name, zeros, PluginFieldType::kINT64, 1),
              PluginField(good[i].name, zeros, PluginFieldType::kINT32, 2),
              PluginField(good[i].name, zeros, PluginFieldType::kINT32, 0),
              PluginField(good[i].name, nullptr, PluginFieldType::kINT32, 1),
              PluginField(nullptr, good[i].data, PluginFieldType::kINT32, 1)}) {
            fields = good;
            fields[i] = bad;
            EXPECT(refused(library, linear, fields));
        }
        for (const int32_t value : {-1, 7777777}) {
            Fields changed = linear.fields;
            changed[good[i].name] = value;
            if (std::strcmp(good[i].name, mbq::kFieldN) == 0 && value > 0) continue;  // many outputs are fine
            EXPECT(refused(library, linear, changed.as_plugin_fields()));
        }
    }
    auto *const creator = library.creator(linear.op);
    EXPECT(creator->createPlugin("node", nullptr, TensorRTPhase::kBUILD) == nullptr);
    const nvinfer1::PluginFieldCollection nothing{3, nullptr}, negative{-1, good.data()};
    EXPECT(creator->createPlugin("node", &negative, TensorRTPhase::kBUILD) == nullptr);
    EXPECT(creator->createPlugin("node", &nothing, TensorRTPhase::kBUILD) == nullptr);
}

inline void check_abi_of_engines(const Library &library, const Linear &linear) {
    Fields fields = linear.fields;
    EXPECT(refused(library, linear, fields.as_plugin_fields(), TensorRTPhase::kRUNTIME));
    fields[mbq::kAbiField] = mbq::kPluginAbi + 1;
    EXPECT(refused(library, linear, fields.as_plugin_fields(), TensorRTPhase::kRUNTIME));
    fields[mbq::kAbiField] = mbq::kPluginAbi;
    EXPECT(!refused(library, linear, fields.as_plugin_fields(), TensorRTPhase::kRUNTIME));
}

inline int shape_change(const Plugin &plugin, const Linear &linear) {
    const auto tensors = linear.input_tensors();
    const auto output = linear.output.described();
    return runtime_part(plugin)->onShapeChange(tensors.data(), static_cast<int32_t>(tensors.size()), &output, 1);
}

inline int configured(const Plugin &plugin, const Linear &linear) {
    const auto ranges = linear.ranges();
    return build_part(plugin)->configurePlugin(ranges.data(), static_cast<int32_t>(linear.inputs.size()),
                                               &ranges.back(), 1);
}

inline void check_bad_tensors(const Library &library, const Linear &linear) {
    const Plugin plugin = library.create(linear.op, linear.fields.as_plugin_fields(), TensorRTPhase::kBUILD);
    EXPECT(shape_change(plugin, linear) == 0 && configured(plugin, linear) == 0);
    for (size_t i = 0; i < linear.inputs.size(); ++i) {
        Linear bad = linear;
        Dims &dims = bad.inputs[i].dims;
        dims.d[dims.nbDims - 1] += 1;  // K of x, or a weight's last size
        EXPECT(shape_change(plugin, bad) != 0 && configured(plugin, bad) != 0);
        bad = linear;
        bad.inputs[i].dims.nbDims = i == 0 ? 0 : bad.inputs[i].dims.nbDims - 1;
        EXPECT(shape_change(plugin, bad) != 0 && configured(plugin, bad) != 0);
        bad = linear;
        bad.inputs[i].type = DataType::kINT8;
        EXPECT(shape_change(plugin, bad) != 0);
        const auto ranges = bad.ranges();
        const auto count = static_cast<int32_t>(bad.inputs.size());
        EXPECT(!build_part(plugin)->supportsFormatCombination(static_cast<int32_t>(i), ranges.data(), count, 1));
        auto blocked = linear.ranges();
        blocked[i].desc.format = nvinfer1::TensorFormat::kHWC8;
        EXPECT(!build_part(plugin)->supportsFormatCombination(static_cast<int32_t>(i), blocked.data(), count, 1));
    }
    Linear bad = linear;
    bad.inputs.pop_back();
    EXPECT(shape_change(plugin, bad) != 0 && configured(plugin, bad) != 0);
    bad = linear;
    bad.output.type = DataType::kFLOAT;
    EXPECT(shape_change(plugin, bad) != 0);
    bad = linear;
    bad.inputs[0].dims.d[0] = bad.inputs[0].dims.d[1] = 1 << 20;  // the product leaves 31 bits
    EXPECT(shape_change(plugin, bad) != 0 && configured(plugin, bad) != 0);
}

inline int enqueue_with(const Plugin &plugin, const Linear &linear, const std::vector<const void *> &inputs,
                        void *output, void *scratch) {
    const auto tensors = linear.input_tensors();
    const auto described = linear.output.described();
    void *outputs[] = {output};
    return runtime_part(plugin)->enqueue(tensors.data(), &described, inputs.data(), outputs, scratch, nullptr);
}

// Statuses below 0 come from the plugin or the kernels' checks, before the driver is asked for anything.
inline void check_bad_calls(const Library &library, const Linear &linear, Place place) {
    const Plugin plugin = library.create(linear.op, linear.fields.as_plugin_fields(), TensorRTPhase::kBUILD);
    const Bound bound(place, linear, built(plugin, linear));
    auto *const y = static_cast<char *>(bound.output.address());
    const auto call = [&](const Linear &seen, const std::vector<const void *> &inputs, void *output) {
        return enqueue_with(plugin, seen, inputs, output, bound.scratch.address());
    };
    for (size_t i = 0; i < bound.addresses.size(); ++i) {
        const bool bias = linear.fields.values[5].second == 1 && i + 1 == bound.addresses.size();
        auto inputs = bound.addresses;
        inputs[i] = static_cast<const char *>(inputs[i]) + 2;
        EXPECT(call(linear, inputs, y) < 0);  // misaligned
        inputs[i] = nullptr;
        EXPECT(bias || call(linear, inputs, y) < 0);
    }
    EXPECT(call(linear, bound.addresses, nullptr) < 0 && call(linear, bound.addresses, y + 8) < 0);
    // int8 activations need scratch; the driver is asked before scratch is looked at.
    if (linear.op == mbq::kW4A8Linear.name) EXPECT(enqueue_with(plugin, linear, bound.addresses, y, nullptr) != 0);
    Linear other = linear;
    other.inputs[0].type = DataType::kFLOAT;
    EXPECT(call(other, bound.addresses, y) < 0);
    other = linear;
    other.inputs[0].dims.d[1] += 1;
    EXPECT(call(other, bound.addresses, y) < 0);  // more rows than the profile allows
    other.inputs[0].dims.d[1] = 0;
    EXPECT(call(other, bound.addresses, y) == 0);  // nothing to do
    EXPECT(bound.output.untouched());
    EXPECT(runtime_part(plugin)->setTactic(0) == 0 && runtime_part(plugin)->setTactic(1) != 0);
    EXPECT(plugin->getCapabilityInterface(static_cast<nvinfer1::PluginCapabilityType>(9)) == nullptr);
}

inline void check_clones_are_independent(const Library &library, const Linear &linear) {
    Plugin first = library.create(linear.op, linear.fields.as_plugin_fields(), TensorRTPhase::kBUILD);
    const Plugin second(first->clone());
    const Fields before = serialized(second);
    EXPECT(serialized(first) == before);
    const auto *const of_first = runtime_part(first)->getFieldsToSerialize();
    const auto *const of_second = runtime_part(second)->getFieldsToSerialize();
    for (int i = 0; i < of_first->nbFields; ++i) EXPECT(of_first->fields[i].data != of_second->fields[i].data);
    EXPECT(configured(second, linear) == 0);
    Linear more = linear;
    more.inputs[0].dims.d[1] = 100;
    EXPECT(configured(first, more) == 0);
    first.reset();
    EXPECT(serialized(second) == before && shape_change(second, linear) == 0);
}
