// A plugin's whole life for one linear, ending in `enqueue`.
#pragma once

#include "expect.h"
#include "linear.h"

constexpr int kInsufficientDriver = 35;  // cudaErrorInsufficientDriver

// Inputs, output and scratch of one execution context.
struct Bound {
    std::vector<Buffer> inputs;
    Buffer output, scratch;
    std::vector<const void *> addresses;

    Bound(Place place, const Linear &linear, size_t scratch_bytes)
        : output(place, linear.output.bytes()), scratch(place, scratch_bytes) {
        for (const std::vector<uint8_t> &content : linear.contents) inputs.emplace_back(place, content);
        for (const Buffer &each : inputs) addresses.push_back(each.address());
    }
    void allow(const Emulator &emulator) const {
        if (emulator.forget_all == nullptr) return;
        emulator.forget_all();
        for (const Buffer &each : inputs) each.allow(emulator, false);
        output.allow(emulator, true);
        scratch.allow(emulator, true);
    }
};

// What a builder asks, in its order. Returns the bytes of scratch.
inline size_t built(const Plugin &plugin, const Linear &linear) {
    auto *const build = build_part(plugin);
    const auto ranges = linear.ranges();
    const auto count = static_cast<int32_t>(linear.inputs.size());
    std::vector<DataType> types;
    for (const Tensor &each : linear.inputs) types.push_back(each.type);
    DataType output_type{};
    EXPECT(build->getNbOutputs() == 1);
    EXPECT(build->getOutputDataTypes(&output_type, 1, types.data(), count) == 0 && output_type == linear.output.type);
    for (int position = 0; position <= count; ++position)
        EXPECT(build->supportsFormatCombination(position, ranges.data(), count, 1));
    EXPECT(build->configurePlugin(ranges.data(), count, &ranges.back(), 1) == 0);
    EXPECT(build->getNbTactics() == 0 && build->getValidTactics(nullptr, 0) == 0);
    EXPECT(std::strstr(build->getTimingCacheID(), "N=") != nullptr);
    EXPECT(std::strstr(build->getMetadataString(), linear.op.c_str()) != nullptr);
    const size_t bytes = build->getWorkspaceSize(ranges.data(), count, &ranges.back(), 1);
    EXPECT(bytes % 256 == 0);
    return bytes;
}

inline int enqueued(const Plugin &plugin, const Linear &linear, const Bound &bound, cudaStream_t stream = nullptr) {
    const auto tensors = linear.input_tensors();
    const auto output = linear.output.described();
    void *outputs[] = {bound.output.address()};
    EXPECT(runtime_part(plugin)->onShapeChange(tensors.data(), static_cast<int32_t>(tensors.size()), &output, 1) == 0);
    return runtime_part(plugin)->enqueue(tensors.data(), &output, bound.addresses.data(), outputs,
                                         bound.scratch.address(), stream);
}

// From fields to a result, then from the serialized fields to the same result.
inline std::vector<uint8_t> whole_life(const Library &library, const Linear &linear, Place place) {
    const Emulator emulator(library.handle());
    const int expected = place == Place::kNowhere ? kInsufficientDriver : 0;
    const Plugin created = library.create(linear.op, linear.fields.as_plugin_fields(), nvinfer1::TensorRTPhase::kBUILD);
    EXPECT(created != nullptr);
    if (created == nullptr) return {};
    EXPECT(core_part(created)->getPluginName() == linear.op);
    const Bound bound(place, linear, built(created, linear));
    bound.allow(emulator);
    const Plugin attached(runtime_part(created)->attachToContext(nullptr));
    const int first = enqueued(attached, linear, bound);
    EXPECT(first == expected);
    if (first != 0 && emulator.message != nullptr) std::printf("emulator: %s\n", emulator.message());
    const std::vector<uint8_t> result = bound.output.read();
    EXPECT(place != Place::kNowhere || bound.output.untouched());

    const Fields written = serialized(created);
    const Plugin loaded = library.create(linear.op, written.as_plugin_fields(), nvinfer1::TensorRTPhase::kRUNTIME);
    EXPECT(loaded != nullptr);
    if (loaded == nullptr) return {};
    EXPECT(serialized(loaded) == written);
    const Bound again(place, linear, built(loaded, linear));
    again.allow(emulator);
    const Plugin attached_again(runtime_part(loaded)->attachToContext(nullptr));
    EXPECT(enqueued(attached_again, linear, again) == expected);
    EXPECT(again.output.read() == result);
    return result;
}
