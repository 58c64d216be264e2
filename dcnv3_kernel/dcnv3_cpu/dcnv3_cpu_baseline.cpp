// Out: the kernels for the compiler's default target. On x86-64 that is x86-64-v2 if build.py compiles, otherwise SSE2. It is
// the only target on aarch64.

#include "dcnv3_cpu.h"

#define DCNV3_ISA baseline
#define DCNV3_VECTOR_BYTES 16
#define DCNV3_F16C 0
#include "kernel_table.h"
