// One linear as a TensorRT plugin (IPluginV3, version 1 of each capability) and its creator. All operators are instances
// of these two templates; `Op::kFacts` says how they differ.
//
// An object holds its fields and nothing else: no device memory, no handle. Weights arrive as inputs of `enqueue`.
#pragma once

#include <new>

#include "guarded.h"
#include "linear_spec.h"
#include "tensorrt.h"

namespace mbq {

constexpr int32_t kRefused = -1;

inline Element element_from(nvinfer1::DataType type) {
    switch (type) {
        case nvinfer1::DataType::kHALF: return Element::kHalf;
        case nvinfer1::DataType::kBF16: return Element::kBFloat16;
        case nvinfer1::DataType::kFLOAT: return Element::kFloat;
        case nvinfer1::DataType::kINT32: return Element::kInt32;
        default: return Element::kOther;
    }
}

inline bool is_activation(Element element) { return element == Element::kHalf || element == Element::kBFloat16; }

inline Shape shape_from(const nvinfer1::Dims &dims) {
    Shape shape;
    shape.rank = dims.nbDims;
    for (int i = 0; i < shape.rank && i < kMostDimensions; ++i) shape.d[i] = dims.d[i];
    return shape;
}

template <class Op>
class LinearPlugin final : public nvinfer1::IPluginV3,
                           public nvinfer1::IPluginV3OneCore,
                           public nvinfer1::IPluginV3OneBuild,
                           public nvinfer1::IPluginV3OneRuntime {
    using Tensor = nvinfer1::PluginTensorDesc;
    using Range = nvinfer1::DynamicPluginTensorDesc;

   public:
    explicit LinearPlugin(const LinearSpec &spec) : spec_(spec) { describe(Op::kFacts, spec, text_, sizeof text_); }

    // ---- IPluginV3 ---------------------------------------------------------------------------------------------

    nvinfer1::IPluginCapability *getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override {
        switch (type) {
            case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore *>(this);
            case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild *>(this);
            case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime *>(this);
        }
        return nullptr;
    }

    nvinfer1::IPluginV3 *clone() noexcept override {
        auto *const copy = new (std::nothrow) LinearPlugin(spec_);
        if (copy != nullptr) copy->most_rows_ = most_rows_;
        return copy;
    }

    // ---- IPluginV3OneCore --------------------------------------------------------------------------------------

    const char *getPluginName() const noexcept override { return Op::kFacts.name; }
    const char *getPluginVersion() const noexcept override { return kPluginVersion; }
    const char *getPluginNamespace() const noexcept override { return kPluginNamespace; }

    // ---- IPluginV3OneBuild -------------------------------------------------------------------------------------

    int32_t getNbOutputs() const noexcept override { return 1; }

    int32_t getOutputDataTypes(nvinfer1::DataType *types, int32_t outputs, const nvinfer1::DataType *inputs,
                               int32_t count) const noexcept override {
        if (outputs != 1 || count != input_count(Op::kFacts, spec_)) return refuse(wrong_count(count));
        if (!is_activation(element_from(inputs[0]))) return refuse(Reason::of("x is neither half nor bfloat16"));
        types[0] = inputs[0];
        return 0;
    }

    int32_t getOutputShapes(const nvinfer1::DimsExprs *inputs, int32_t count, const nvinfer1::DimsExprs *, int32_t,
                            nvinfer1::DimsExprs *outputs, int32_t output_count,
                            nvinfer1::IExprBuilder &build) noexcept override {
        return guarded(Op::kFacts.name, kRefused, [&] {
            if (output_count != 1 || count != input_count(Op::kFacts, spec_)) return refuse(wrong_count(count));
            const int last = inputs[0].nbDims - 1;
            if (last < 0) return refuse(Reason::of("x is a scalar"));
            const nvinfer1::IDimensionExpr *const columns = inputs[0].d[last];
            if (columns->isConstant() && columns->getConstantValue() != spec_.k)
                return refuse(Reason::of("x has %lld columns, expected K = %d",
                                         static_cast<long long>(columns->getConstantValue()), spec_.k));
            outputs[0] = inputs[0];
            outputs[0].d[last] = build.constant(output_columns(spec_));
            return 0;
        });
    }

    bool supportsFormatCombination(int32_t position, const Range *tensors, int32_t inputs,
                                   int32_t outputs) noexcept override {
        if (inputs != input_count(Op::kFacts, spec_) || outputs != 1) return false;
        const Tensor &tensor = tensors[position].desc;
        if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
        const Element element = element_from(tensor.type), activation = element_from(tensors[0].desc.type);
        if (position == 0) return is_activation(element);
        return element == (position == inputs ? activation : constant_element(Op::kFacts, spec_, position, activation));
    }

    // Called once per optimization profile.
    int32_t configurePlugin(const Range *inputs, int32_t count, const Range *, int32_t) noexcept override {
        Shape largest[kMostInputs];
        for (int i = 0; i < count && i < kMostInputs; ++i) largest[i] = shape_from(inputs[i].max);
        if (const Reason reason = check_shapes(Op::kFacts, spec_, largest, count)) return refuse(reason);
        const int64_t rows = rows_of(largest[0]);
        if (rows < 0) return refuse(Reason::of("x has too many rows, or an unknown number"));
        if (rows > most_rows_) most_rows_ = static_cast<int32_t>(rows);
        return 0;
    }

    size_t getWorkspaceSize(const Range *inputs, int32_t count, const Range *, int32_t) const noexcept override {
        const int64_t rows = count > 0 ? rows_of(shape_from(inputs[0].max)) : -1;
        if (rows < 0) return 0;  // configurePlugin refused it before
        return workspace_bytes(Op::kFacts, spec_, element_from(inputs[0].desc.type), static_cast<int32_t>(rows));
    }

    const char *getTimingCacheID() noexcept override { return text_; }
    const char *getMetadataString() noexcept override { return text_; }

    // ---- IPluginV3OneRuntime -----------------------------------------------------------------------------------

    int32_t setTactic(int32_t tactic) noexcept override { return tactic == 0 ? 0 : kRefused; }

    // Looks at sizes and types only; the kernels choose by the device when they are launched.
    int32_t onShapeChange(const Tensor *inputs, int32_t count, const Tensor *outputs, int32_t output_count) noexcept override {
        Shape shapes[kMostInputs];
        for (int i = 0; i < count && i < kMostInputs; ++i) shapes[i] = shape_from(inputs[i].dims);
        if (const Reason reason = check_shapes(Op::kFacts, spec_, shapes, count)) return refuse(reason);
        const Element activation = element_from(inputs[0].type);
        if (!is_activation(activation) || output_count != 1 || element_from(outputs[0].type) != activation)
            return refuse(Reason::of("x and y must both be half or both bfloat16"));
        for (int i = 1; i < count; ++i)
            if (element_from(inputs[i].type) != constant_element(Op::kFacts, spec_, i, activation))
                return refuse(Reason::of("input %d has another type than its weights", i));
        if (rows_of(shapes[0]) < 0) return refuse(Reason::of("x has too many rows, or an unknown number"));
        return 0;
    }

    int32_t enqueue(const Tensor *input_tensors, const Tensor *, const void *const *inputs, void *const *outputs,
                    void *workspace, cudaStream_t stream) noexcept override {
        const int64_t rows = rows_of(shape_from(input_tensors[0].dims));
        if (rows < 0 || (most_rows_ > 0 && rows > most_rows_))
            return refuse(Reason::of("%lld rows, configured for %d", static_cast<long long>(rows), most_rows_));
        const Element activation = element_from(input_tensors[0].type);
        const int32_t m = static_cast<int32_t>(rows);
        const MbqLinear call = kernel_call(Op::kFacts, spec_, activation, inputs);
        const size_t bytes = workspace == nullptr ? 0 : workspace_bytes(Op::kFacts, spec_, activation, m);
        const int status = mbq_linear(&call, m, inputs[0], outputs[0], workspace, bytes, stream);
        return status == 0 ? 0 : refuse(Reason::of("M=%d: status %d, %s", m, status, mbq_status(status)), status);
    }

    // Nothing belongs to a context: the clone is as good as the original.
    nvinfer1::IPluginV3 *attachToContext(nvinfer1::IPluginResourceContext *) noexcept override { return clone(); }

    const nvinfer1::PluginFieldCollection *getFieldsToSerialize() noexcept override {
        for (int i = 0; i < kFieldCount; ++i)
            fields_[i] = {kFieldPlaces[i].name, &(spec_.*kFieldPlaces[i].member), nvinfer1::PluginFieldType::kINT32, 1};
        fields_[kFieldCount] = {kAbiField, &abi_, nvinfer1::PluginFieldType::kINT32, 1};
        collection_ = {kFieldCount + 1, fields_};
        return &collection_;
    }

   private:
    static constexpr int kMostInputs = 8;
    static_assert(Op::kFacts.inputs + 1 <= kMostInputs, "room for every input");

    Reason wrong_count(int32_t count) const {
        return Reason::of("%d inputs, expected %d", count, input_count(Op::kFacts, spec_));
    }

    // Errors are always said, but once per object: an engine calls thousands of times.
    int32_t refuse(const Reason &reason, int32_t status = kRefused) const noexcept {
        if (!complained_) {
            say("error", Op::kFacts.name, reason.text);
            say("error", "in", text_);
        }
        complained_ = true;
        return status;
    }

    LinearSpec spec_;
    int32_t most_rows_ = 0;  // of all profiles; 0 in an object read from an engine, whose profiles TensorRT checks
    int32_t abi_ = kPluginAbi;
    mutable bool complained_ = false;
    char text_[256];
    nvinfer1::PluginField fields_[kFieldCount + 1];
    nvinfer1::PluginFieldCollection collection_;
};

template <class Op>
class LinearCreator final : public nvinfer1::IPluginCreatorV3One {
   public:
    LinearCreator() {
        for (int i = 0; i < kFieldCount; ++i)
            declared_[i] = {kFields[i], nullptr, nvinfer1::PluginFieldType::kINT32, 1};
        collection_ = {kFieldCount, declared_};
    }

    // Null unless every field is right; the reason goes to stderr.
    nvinfer1::IPluginV3 *createPlugin(const char *, const nvinfer1::PluginFieldCollection *given,
                                      nvinfer1::TensorRTPhase phase) noexcept override {
        LinearSpec spec;
        if (const Reason reason = read(given, phase == nvinfer1::TensorRTPhase::kRUNTIME, &spec)) {
            say("error", Op::kFacts.name, reason.text);
            return nullptr;
        }
        say_if_asked(Op::kFacts.name, "created");
        return new (std::nothrow) LinearPlugin<Op>(spec);
    }

    const nvinfer1::PluginFieldCollection *getFieldNames() noexcept override { return &collection_; }
    const char *getPluginName() const noexcept override { return Op::kFacts.name; }
    const char *getPluginVersion() const noexcept override { return kPluginVersion; }
    const char *getPluginNamespace() const noexcept override { return kPluginNamespace; }

   private:
    static constexpr int kMostFields = 64;

    static Reason read(const nvinfer1::PluginFieldCollection *given, bool from_engine, LinearSpec *spec) {
        if (given == nullptr || given->fields == nullptr) return Reason::of("no fields at all");
        if (given->nbFields < 0 || given->nbFields > kMostFields) return Reason::of("%d fields", given->nbFields);
        Field fields[kMostFields];
        for (int i = 0; i < given->nbFields; ++i) {
            const nvinfer1::PluginField &field = given->fields[i];
            fields[i] = {field.name, field.type == nvinfer1::PluginFieldType::kINT32, field.length, field.data};
        }
        return parse_fields(Op::kFacts, fields, given->nbFields, from_engine, spec);
    }

    nvinfer1::PluginField declared_[kFieldCount];
    nvinfer1::PluginFieldCollection collection_;
};

}  // namespace mbq
