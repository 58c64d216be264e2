// The kernels for whatever the compiler targets by default: x86-64-v2 where build.py compiles, SSE2 otherwise; aarch64.

#include "dcnv3_cpu.h"

#define DCNV3_ISA baseline
#define DCNV3_VECTOR_BYTES 16
#define DCNV3_F16C 0
#include "dcnv3_cpu_kernels.h"
