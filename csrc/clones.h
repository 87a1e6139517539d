// Functions whose loops vectorise: compiled for several instruction sets where the loader can
// choose between them, once for the baseline everywhere else. The integers are the same.
#pragma once

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define PERCOV2_VECTOR_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PERCOV2_VECTOR_CLONES __attribute__((target_clones("avx2", "default")))
#endif
#define PERCOV2_INLINE inline __attribute__((always_inline))
#else
#define PERCOV2_VECTOR_CLONES
#define PERCOV2_INLINE inline
#endif
