// What the library says about itself, and where it gets its threads from.
#include "parallel.h"
#include "simd.h"

ParallelRegion parallel_region = nullptr;

extern "C" EXPORT void set_parallel_region(ParallelRegion region) { parallel_region = region; }
extern "C" EXPORT int64_t vector_width() { return WIDTH; }
