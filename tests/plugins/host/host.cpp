// Takes plugins through their life with TensorRT's headers and without its library.
//
//   host LIBRARY creators             what the library offers, one line each
//   host LIBRARY life                 every operator from its fields to `enqueue`, serialized, and again
//   host LIBRARY refusals             bad fields, shapes, types, pointers
//   host LIBRARY leaks COUNT          create, clone, destroy
//   host LIBRARY case FILE RESULT     one problem with numbers; its result as raw bytes
//
// A library of CUDA code on a machine without a driver refuses every launch with 35; the emulated one computes on the
// CPU; compiled with MBQ_HOST_CUDA this program computes on the GPU, also from a graph and on two streams.
#include "case_file.h"
#include "examples.h"
#include "expect.h"
#include "refusals.h"
#include "run_linear.h"
#ifdef MBQ_HOST_CUDA
#include "gpu.h"
#endif

namespace {

Place place_of(const Library &library) {
#ifdef MBQ_HOST_CUDA
    (void)library;
    return Place::kGpu;
#else
    return Emulator(library.handle()).allow != nullptr ? Place::kEmulator : Place::kNowhere;
#endif
}

void list_creators(const Library &library) {
    for (auto *creator : library.creators()) {
        EXPECT(std::strcmp(creator->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") == 0);
        std::printf("%s %s %s", creator->getPluginName(), creator->getPluginVersion(), creator->getPluginNamespace());
        const nvinfer1::PluginFieldCollection *declared = creator->getFieldNames();
        for (int i = 0; i < declared->nbFields; ++i) {
            EXPECT(declared->fields[i].type == nvinfer1::PluginFieldType::kINT32 && declared->fields[i].length == 1);
            std::printf(" %s", declared->fields[i].name);
        }
        std::printf("\n");
    }
}

void check_refusals(const Library &library) {
    for (const Linear &linear : all_examples()) {
        check_bad_fields(library, linear);
        check_abi_of_engines(library, linear);
        check_bad_tensors(library, linear);
        check_bad_calls(library, linear, place_of(library));
        check_clones_are_independent(library, linear);
    }
}

void check_leaks(const Library &library, int count) {
    const std::vector<Linear> examples = all_examples();
    for (int i = 0; i < count; ++i) {
        const Linear &linear = examples[static_cast<size_t>(i) % examples.size()];
        const Plugin plugin = library.create(linear.op, linear.fields.as_plugin_fields(), TensorRTPhase::kBUILD);
        const Plugin clone(plugin->clone());
        const Plugin attached(runtime_part(clone)->attachToContext(nullptr));
        EXPECT(serialized(attached) == serialized(plugin));
    }
}

void run_case(const Library &library, const char *file, const char *result) {
    const Linear linear = read_case(file);
    const std::vector<uint8_t> y = whole_life(library, linear, place_of(library));
#ifdef MBQ_HOST_CUDA
    check_graphs_and_streams(library, linear, y);
#endif
    write_bytes(result, y);
}

}  // namespace

int main(int count, char **words) {
    if (count < 3) {
        std::printf("host LIBRARY creators|life|refusals|leaks COUNT|case FILE RESULT\n");
        return 2;
    }
    const Library library(words[1]);
    const std::string task = words[2];
    if (task == "creators") list_creators(library);
    if (task == "life")
        for (const Linear &linear : all_examples()) whole_life(library, linear, place_of(library));
    if (task == "refusals") check_refusals(library);
    if (task == "leaks" && count == 4) check_leaks(library, std::atoi(words[3]));
    if (task == "case" && count == 5) run_case(library, words[3], words[4]);
    return verdict();
}
