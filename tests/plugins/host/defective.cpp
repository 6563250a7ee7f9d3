// Plugin libraries with one planted defect each, for tests of those who load them: -DDEFECT=<name below>.
#include <NvInferRuntime.h>

#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <unistd.h>

#define NONE 0
#define NO_LOGGER_FINDER 1      // the second export is missing
#define THROWS 2                // getCreators throws
#define CRASHES 3               // getCreators reads no man's memory
#define HANGS 4                 // getCreators never returns
#define EXITS 5                 // loading it ends the process, with status 0
#define NULL_CREATORS 6
#define COUNTLESS_CREATORS 7    // 10^9 of them
#define UNDEFINED_SYMBOL 8
#define OTHER_NAMESPACE 9
#define CREATOR_THROWS 10       // createPlugin throws out of a function that must not

using nvinfer1::IPluginCreatorInterface;

extern "C" void nobody_defines_this();

namespace {

class Creator final : public nvinfer1::IPluginCreatorV3One {
   public:
    explicit Creator(const char *name) : name_(name) {}

    nvinfer1::IPluginV3 *createPlugin(const char *, const nvinfer1::PluginFieldCollection *,
                                      nvinfer1::TensorRTPhase) noexcept override {
        if (DEFECT == CREATOR_THROWS) throw std::runtime_error("planted");
        return nullptr;
    }
    const nvinfer1::PluginFieldCollection *getFieldNames() noexcept override { return &none_; }
    const char *getPluginName() const noexcept override { return name_; }
    const char *getPluginVersion() const noexcept override { return "1"; }
    const char *getPluginNamespace() const noexcept override { return DEFECT == OTHER_NAMESPACE ? "" : "mbq"; }

   private:
    const char *name_;
    nvinfer1::PluginFieldCollection none_{0, nullptr};
};

#if DEFECT == EXITS
__attribute__((constructor)) void leave() { _exit(0); }
#endif

}  // namespace

__attribute__((used, section(".mbq_plugin"))) static const char record[] =
    "{\"abi\":1,\"kernel_abi\":1,\"layout_version\":1,\"trt_headers\":\"10.14.1\"}";

#define VISIBLE __attribute__((visibility("default")))

extern "C" VISIBLE IPluginCreatorInterface *const *getCreators(int32_t &count) {
    static Creator w3("W3Linear"), w4a16("W4A16Linear"), w4a8("W4A8Linear");
    static IPluginCreatorInterface *const creators[] = {&w3, &w4a16, &w4a8};
    count = DEFECT == COUNTLESS_CREATORS ? 1000000000 : 3;
#if DEFECT == THROWS
    throw std::runtime_error("planted");
#elif DEFECT == CRASHES
    volatile int *const nowhere = reinterpret_cast<int *>(8);
    count = *nowhere;
#elif DEFECT == HANGS
    for (;;) pause();
#elif DEFECT == UNDEFINED_SYMBOL
    nobody_defines_this();
#elif DEFECT == NULL_CREATORS
    return nullptr;
#endif
    return creators;
}

#if DEFECT != NO_LOGGER_FINDER
extern "C" VISIBLE void setLoggerFinder(nvinfer1::ILoggerFinder *) {}
#endif
