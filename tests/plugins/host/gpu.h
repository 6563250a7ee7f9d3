// What only a GPU can show: a captured graph, two contexts at once on two streams. Results must agree to the last bit.
#pragma once

#include <cuda_runtime_api.h>

#include "run_linear.h"

constexpr int kReplays = 3;

inline void check_graph(const Plugin &context, const Linear &linear, const Bound &bound,
                        const std::vector<uint8_t> &expected) {
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t ready;
    check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
    check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "begin of capture");
    EXPECT(enqueued(context, linear, bound, stream) == 0);
    check_cuda(cudaStreamEndCapture(stream, &graph), "end of capture");
    check_cuda(cudaGraphInstantiateWithFlags(&ready, graph, 0), "instantiate");
    for (int i = 0; i < kReplays; ++i) {
        check_cuda(cudaMemsetAsync(bound.output.address(), kUntouched, linear.output.bytes(), stream), "memset");
        check_cuda(cudaGraphLaunch(ready, stream), "launch");
        EXPECT(bound.output.read() == expected);
    }
    cudaGraphExecDestroy(ready);
    cudaGraphDestroy(graph);
    cudaStreamDestroy(stream);
}

inline void check_graphs_and_streams(const Library &library, const Linear &linear,
                                     const std::vector<uint8_t> &expected) {
    const Plugin plugin = library.create(linear.op, linear.fields.as_plugin_fields(), nvinfer1::TensorRTPhase::kBUILD);
    const size_t scratch = built(plugin, linear);
    const Plugin first(runtime_part(plugin)->attachToContext(nullptr));
    const Plugin second(runtime_part(plugin)->attachToContext(nullptr));
    const Bound of_first(Place::kGpu, linear, scratch), of_second(Place::kGpu, linear, scratch);
    check_graph(first, linear, of_first, expected);
    cudaStream_t streams[2];
    for (cudaStream_t &each : streams) check_cuda(cudaStreamCreateWithFlags(&each, cudaStreamNonBlocking), "stream");
    for (int i = 0; i < kReplays; ++i) {
        EXPECT(enqueued(first, linear, of_first, streams[0]) == 0);
        EXPECT(enqueued(second, linear, of_second, streams[1]) == 0);
    }
    EXPECT(of_first.output.read() == expected && of_second.output.read() == expected);
    for (const cudaStream_t each : streams) cudaStreamDestroy(each);
}
