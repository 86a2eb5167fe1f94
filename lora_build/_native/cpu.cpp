// What this processor has beyond what every one of its architecture has, and what the library was compiled of.

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED const char* sources() { return SOURCES; }

#if defined(__x86_64__)
#include <cpuid.h>

EXPORTED int has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

EXPORTED int has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

EXPORTED int has_sha() {
  unsigned a, b, c, d;
  return __builtin_cpu_supports("sse4.1") && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b >> 29 & 1);
}
#else
#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>

EXPORTED int has_sha() { return (getauxval(AT_HWCAP) & HWCAP_SHA2) != 0; }
#else
EXPORTED int has_sha() { return 0; }
#endif

EXPORTED int has_avx2() { return 0; }
EXPORTED int has_avx512() { return 0; }
#endif
