// What this processor has beyond what every one of its architecture has, and what the library was compiled of.

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED const char* sources() { return SOURCES; }

#if defined(__x86_64__)
EXPORTED int has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

EXPORTED int has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#else
EXPORTED int has_avx2() { return 0; }
EXPORTED int has_avx512() { return 0; }
#endif
