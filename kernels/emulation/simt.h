// A GPU's threads on one CPU thread: what arch.cuh calls when kernels are compiled with -DMBQ_EMULATION.
//
//   faults.h         what can be wrong with a kernel, and where
//   threads.h        launch, schedules, barriers, meeting points of warps
//   shared_memory.h  races, copies in the background
//   global_memory.h  registered buffers, visibility between blocks
//   collectives.h    mma, ldmatrix, shuffle
//   numbers.h        fp16, bf16 and fp32 with the device's rounding
#pragma once

#include "collectives.h"
#include "faults.h"
#include "global_memory.h"
#include "numbers.h"
#include "shared_memory.h"
#include "threads.h"
