// Out: the kernels for AVX-512 F, BW, DQ and VL (x86-64-v4). The choice is made at run time.

#include "dcnv3_cpu.h"

#ifdef DCNV3_X86_VARIANTS
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,lzcnt,movbe,popcnt"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,lzcnt,movbe,popcnt,prefer-vector-width=512")
#endif
#define DCNV3_ISA avx512
#define DCNV3_VECTOR_BYTES 64
#define DCNV3_F16C 1
#include "kernel_table.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
