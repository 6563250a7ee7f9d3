// The TensorRT headers, and all that this project knows of their versions.
//
// 10.3 .. 11.4 have the same version-1 plugin interfaces, which is all that is used here. What differs, and is therefore
// never called: the vtables of ILoggerFinder and IPluginRegistry. Headers of TensorRT for RTX number themselves 1.x.
#pragma once

#include <NvInferRuntime.h>

#ifdef TRT_MAJOR_RTX
static_assert(NV_TENSORRT_MAJOR >= 1, "TensorRT for RTX 1.0 or newer is needed");
#else
static_assert(NV_TENSORRT_MAJOR > 10 || (NV_TENSORRT_MAJOR == 10 && NV_TENSORRT_MINOR >= 3),
              "TensorRT 10.3 or newer is needed");
#endif

#define MBQ_TEXT_OF(x) #x
#define MBQ_TEXT(x) MBQ_TEXT_OF(x)
#define MBQ_TRT_HEADERS \
    MBQ_TEXT(NV_TENSORRT_MAJOR) "." MBQ_TEXT(NV_TENSORRT_MINOR) "." MBQ_TEXT(NV_TENSORRT_PATCH)
