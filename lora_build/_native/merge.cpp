// The loops of kernel.py: W + sum of B@A over stored values, rounded once.
//
// Compiled once for each instruction set (LEVEL names it), since what it gives does not depend on that: where the plain
// sum in float32 cannot decide how the exact sum rounds, the exact sum does. Additions and products are fused where
// `fma` says so and nowhere else: -ffp-contract=off.

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__)
#include <immintrin.h>
#define VECTOR_BYTES 64
#elif defined(__AVX2__)
#include <immintrin.h>
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

#define EXPORTED extern "C" __attribute__((visibility("default")))
#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define INLINE __attribute__((always_inline)) inline

namespace {  // the same names, compiled for another instruction set, are other functions

using std::int64_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;

enum Format { BF16, F16, F32 };

constexpr int64_t PANEL = 32;    // columns of A that lie together
constexpr int64_t TILE = 1024;   // columns at a time: their part of A stays in the second cache
constexpr int64_t ROWS = 4;      // rows at a time
constexpr int64_t TERMS = 8;     // products that are summed before they are added to the others
constexpr int64_t PLACES = 4096; // elements in doubt that are collected before they are settled

constexpr uint32_t ABS = 0x7FFFFFFF, NAN32 = 0x7FC00000;
constexpr uint32_t SIGN16 = 0x8000, ABS16 = 0x7FFF;
constexpr uint32_t BIAS = 0x38000000;  // float32 minus float16, in the exponent
constexpr uint32_t INFINITY_OF[] = {0x7F80, 0x7C00, 0x7F800000};
constexpr uint32_t NAN_OF[] = {0x7FC0, 0x7E00, NAN32};
// magnitudes that the quick way may decide: 2**-90 to 2**127, of float16 its normal numbers
constexpr uint32_t LEAST[] = {0x12800000, 0x38800000, 0x12800000};
constexpr uint32_t SPAN[] = {0x7F000000 - 0x12800000, 0x477FE000 - 0x38800000, 0x7F000000 - 0x12800000};

// Vectors of `Real`, in which updates are summed, and of as many elements of other types.
struct Single {
  using Real = float;
  static constexpr int64_t SIZE = VECTOR_BYTES / 4;
  static constexpr uint32_t MAGNITUDE = ABS;
  typedef float R __attribute__((vector_size(VECTOR_BYTES)));
  typedef int32_t Mask __attribute__((vector_size(VECTOR_BYTES)));
  typedef float F __attribute__((vector_size(VECTOR_BYTES)));
  typedef int32_t I __attribute__((vector_size(VECTOR_BYTES)));
  typedef uint32_t U __attribute__((vector_size(VECTOR_BYTES)));
  typedef uint16_t H __attribute__((vector_size(VECTOR_BYTES / 2)));
};
struct Double {
  using Real = double;
  static constexpr int64_t SIZE = VECTOR_BYTES / 8;
  static constexpr uint64_t MAGNITUDE = ~0ull >> 1;
  typedef double R __attribute__((vector_size(VECTOR_BYTES)));
  typedef int64_t Mask __attribute__((vector_size(VECTOR_BYTES)));
  typedef float F __attribute__((vector_size(VECTOR_BYTES / 2)));
  typedef int32_t I __attribute__((vector_size(VECTOR_BYTES / 2)));
  typedef uint32_t U __attribute__((vector_size(VECTOR_BYTES / 2)));
  typedef uint16_t H __attribute__((vector_size(VECTOR_BYTES / 4)));
};

template <class To, class From> INLINE To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

template <class T> INLINE T load(const void* from) {
  T x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

template <class T> INLINE void store(void* to, T x) { std::memcpy(to, &x, sizeof x); }

template <class V> INLINE V fused(V a, V b, V c) {
#if defined(__AVX512F__)
  if constexpr (sizeof a == 64 && sizeof a[0] == 4) return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  if constexpr (sizeof a == 64 && sizeof a[0] == 8) return (V)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#endif
#if defined(__FMA__)
  if constexpr (sizeof a == 32 && sizeof a[0] == 4) return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  if constexpr (sizeof a == 32 && sizeof a[0] == 8) return (V)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#endif
  return a * b + c;
}

// One bit for each element of a mask, whose elements are 0 or -1.
template <class V> INLINE uint64_t marks(V mask) {
  constexpr int64_t SIZE = sizeof mask / sizeof mask[0];
#if defined(__AVX512F__)
  if constexpr (sizeof mask == 64) return _mm512_movepi32_mask((__m512i)mask);
  else return _mm256_movemask_ps((__m256)mask);
#elif defined(__AVX2__)
  if constexpr (sizeof mask == 32) return _mm256_movemask_ps((__m256)mask);
  else return _mm_movemask_ps((__m128)mask);
#else
  uint64_t found = 0;
  for (int64_t k = 0; k < SIZE; k++) found |= (uint64_t)(mask[k] & 1) << k;
  return found;
#endif
  (void)SIZE;
}

template <class V> INLINE double sum(V x) {
  double total = 0;
  for (uint64_t k = 0; k < sizeof x / sizeof x[0]; k++) total += x[k];
  return total;
}

// ---- One value, or a vector of them: U is uint32_t or a vector of it, F of float.

template <class F, class U> INLINE F of_bf16(U h) { return bits<F>((U)(h << 16)); }

template <class F, class U> INLINE F of_f16(U h) {
  F size = bits<F>((U)((h & ABS16) << 13)) * 0x1p112f;
  U special = bits<U>(size) >= 0x47800000u ? U{} + INFINITY_OF[F32] : U{};  // infinity and NaN
  return bits<F>((U)(bits<U>(size) | special | ((h & SIGN16) << 16)));
}

// Half to even; not for NaN.
template <class F, class U> INLINE U to_bf16(F x) {
  U u = bits<U>(x);
  return (U)((u + 0x7FFF + ((u >> 16) & 1)) >> 16);
}

// Half to even; only for what is a normal number there.
template <class F, class U> INLINE U to_f16(F x) {
  U u = bits<U>(x), m = u & ABS;
  return (U)(((m + 0x0FFF + ((m >> 13) & 1) - BIAS) >> 13) | ((u >> 16) & SIGN16));
}

// Half to even; not for NaN. Adding 1/2 rounds to float16's smallest step.
template <class F, class U> INLINE U to_any_f16(F x) {
  U m = bits<U>(x) & ABS, small = bits<U>((F)(bits<F>(m) + 0.5f)) - 0x3F000000;
  U size = m < LEAST[F16] ? small : m < 0x477FF000 ? to_f16<F, U>(bits<F>(m)) : U{} + INFINITY_OF[F16];
  return (U)(size | ((bits<U>(x) >> 16) & SIGN16));
}

// The bits of x in a format, rounded once, half to even; every NaN becomes the same quiet NaN; see `round_once` in
// arithmetic.py.
template <Format TARGET> uint32_t rounded(double x) {
  if (x != x) return NAN_OF[TARGET];
  if constexpr (TARGET == F32) return bits<uint32_t>((float)x);
  const uint64_t low = 0x1FFFFFFF, u = bits<uint64_t>(x);
  const float odd = (float)bits<double>((((u & low) + low) | u) & ~low);
  const uint32_t size = bits<uint32_t>(odd) & ABS, sign = (bits<uint32_t>(odd) >> 16) & SIGN16;
  if constexpr (TARGET == BF16) {
    if (__builtin_fabs(x) < 0x1p-126) return sign | (uint32_t)__builtin_rint(__builtin_fabs(x) * 0x1p133);
    return to_bf16<float, uint32_t>(odd);
  }
  if (LEAST[F16] <= size && size < 0x47800000) return to_f16<float, uint32_t>(odd);
  if (size < LEAST[F16]) return sign | (uint32_t)__builtin_rint((double)bits<float>(size) * 0x1p24);
  return sign | INFINITY_OF[F16];
}

template <Format SOURCE> INLINE float widened(const void* x, int64_t k) {
  if constexpr (SOURCE == F32) return ((const float*)x)[k];
  const uint32_t h = ((const uint16_t*)x)[k];
  if constexpr (SOURCE == BF16) return of_bf16<float, uint32_t>(h);
  return of_f16<float, uint32_t>(h);
}

template <Format TARGET> INLINE uint32_t stored(const void* out, int64_t k) {
  if constexpr (TARGET == F32) return ((const uint32_t*)out)[k];
  return ((const uint16_t*)out)[k];
}

template <Format TARGET> INLINE void put(void* out, int64_t k, uint32_t y) {
  if constexpr (TARGET == F32) ((uint32_t*)out)[k] = y;
  else ((uint16_t*)out)[k] = (uint16_t)y;
}

// Whether two values have other bits; -0 and 0 are the same.
template <Format TARGET> INLINE bool differ(uint32_t now, uint32_t before) {
  return now != before && ((now | before) & (TARGET == F32 ? ABS : ABS16));
}

// ---- Elements in doubt.

// What is merged, and into what; see `Job` in __init__.py.
struct Job {
  const void* x;
  void* out;
  int64_t num_rows, width;
  const void *left, *right;  // float or double: [rows, terms] and ROWS - 1 more; panels of columns, each [terms, PANEL]
  int64_t num_terms;         // a multiple of TERMS
  const void *bound, *columns;
  double slack;
  const double *left64, *last_bound, *right64, *norms;  // [rows, rank], [rows], [columns, rank], [columns]
  int64_t rank, left_bits, right_bits;
  double* found;
};

double dot(const double* a, const double* b, int64_t n) {
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t k = 0; k < n; k++) total += a[k] * b[k];
  return total;
}

// 2**(bits - e), 2**e being the power of two above `largest`.
double grid(double largest, int64_t num_bits) {
  const int64_t exponent = (int64_t)(bits<uint64_t>(largest) >> 52) - 1022, scale = num_bits - exponent + 1023;
  return bits<double>((uint64_t)(scale < 1 ? 1 : scale > 2046 ? 2046 : scale) << 52);
}

INLINE double larger(double x, double largest) { return __builtin_fabs(x) <= largest ? largest : __builtin_fabs(x); }

INLINE double on_grid(double x, double scale) { return __builtin_rint(x * scale) / scale; }

// A row on its coarse grid, and what that leaves on the grid of what is left.
struct Grids {
  double first, second;
  Grids(const double* row, int64_t n, int64_t num_bits) {
    double largest = 0, rest = 0;
    for (int64_t k = 0; k < n; k++) largest = larger(row[k], largest);
    first = grid(largest, num_bits);
    for (int64_t k = 0; k < n; k++) rest = larger(row[k] - on_grid(row[k], first), rest);
    second = grid(rest, num_bits);
  }
};

// W plus the exact sum on the coarse grids, plus what the grids left; see arithmetic.py.
double exact(double w, const double* left, int64_t left_bits, const double* right, int64_t right_bits, int64_t n) {
  const Grids of_left(left, n, left_bits), of_right(right, n, right_bits);
  double main = 0, first = 0, second = 0;
  for (int64_t k = 0; k < n; k++) {  // no sum rounds as long as float64 has their range, so no order matters
    const double left1 = on_grid(left[k], of_left.first), right1 = on_grid(right[k], of_right.first);
    main += left1 * right1;
    first += on_grid(left[k] - left1, of_left.second) * right1;
    second += left1 * on_grid(right[k] - right1, of_right.second);
  }
  return (w + main) + (first + second);
}

// Settle elements: by a plain sum in float64 where its interval rounds to one value, else exactly.
template <Format SOURCE, Format TARGET> void settle(const Job& job, const int64_t* places, int64_t num_places) {
  job.found[5] += num_places;
  for (int64_t q = 0; q < num_places; q++) {
    const int64_t k = places[q], i = k / job.width, j = k % job.width;
    const double *left = job.left64 + i * job.rank, *right = job.right64 + j * job.rank;
    const double w = widened<SOURCE>(job.x, k);
    const uint32_t unmerged = SOURCE == TARGET ? stored<TARGET>(job.x, k) : rounded<TARGET>(w);
    const double v = w + dot(left, right, job.rank);
    const double e = job.last_bound[i] * job.norms[j] + __builtin_fabs(v) * 0x1p-50;
    uint32_t y = rounded<TARGET>(v + e);
    if (y != rounded<TARGET>(v - e) || e != e)
      y = rounded<TARGET>(exact(w, left, job.left_bits, right, job.right_bits, job.rank));
    put<TARGET>(job.out, k, y);
    job.found[3] += differ<TARGET>(y, unmerged);
    job.found[4] += (y & INFINITY_OF[TARGET]) == INFINITY_OF[TARGET];
  }
}

// ---- The pass.

// What was done to some elements; changes only of those that were not in doubt, none of which is infinite.
template <class V> struct Tally {
  typename V::F of_w{}, of_d{};
  typename V::I num_updated{}, num_changed{};

  void add_to(double* found) const {
    found[0] += sum(of_w), found[1] += sum(of_d), found[2] += sum(num_updated), found[3] += sum(num_changed);
  }
};

template <Format SOURCE, Format TARGET> struct Pass {
  using V = std::conditional_t<TARGET == F32, Double, Single>;
  using Real = typename V::Real;
  using R = typename V::R;
  using F = typename V::F;
  using I = typename V::I;
  using U = typename V::U;
  using H = typename V::H;
  using Stored = std::conditional_t<SOURCE == F32, U, H>;
  using Result = std::conditional_t<TARGET == F32, U, H>;
  static constexpr int64_t SIZE = V::SIZE, PAIR = 2 * SIZE;
  static_assert(PANEL % PAIR == 0 && TILE % PAIR == 0);

  static INLINE R broadcast(Real x) { return x - R{}; }

  // Rows of `left` times two vectors of columns, the first of which is column j. The order of additions is the one that
  // `_weights` in kernel.py counts the roundings of.
  static INLINE void products(const Job& job, int64_t row, int64_t j, R (&result)[ROWS][2]) {
    R total[ROWS][2] = {};
    const int64_t terms = job.num_terms;
    const Real* left = (const Real*)job.left + row * terms;
    const Real* right = (const Real*)job.right + j / PANEL * terms * PANEL + j % PANEL;
    for (int64_t t = 0; t < terms; t += TERMS) {
      R part[ROWS][2] = {};
#pragma GCC unroll 8
      for (int64_t k = t; k < t + TERMS; k++) {
        const R first = load<R>(right + k * PANEL), second = load<R>(right + k * PANEL + SIZE);
#pragma GCC unroll 4
        for (int64_t p = 0; p < ROWS; p++) {
          const R b = broadcast(left[p * terms + k]);
          part[p][0] = fused(b, first, part[p][0]);
          part[p][1] = fused(b, second, part[p][1]);
        }
      }
#pragma GCC unroll 4
      for (int64_t p = 0; p < ROWS; p++) {
        total[p][0] += part[p][0];
        total[p][1] += part[p][1];
      }
    }
#pragma GCC unroll 4
    for (int64_t p = 0; p < ROWS; p++) result[p][0] = total[p][0], result[p][1] = total[p][1];
  }

  // A result is cut off from the bits of a float32 to which HALF a last place was added. If this gives the same from
  // both ends of an interval, it is what each value between them rounds to: none is a midpoint, where half to even and
  // half up differ.
  static constexpr uint32_t HALF = TARGET == BF16 ? 0x8000 : TARGET == F16 ? 0x1000 : 0;
  static constexpr uint32_t KEPT = TARGET == BF16 ? 0xFFFF0000 : TARGET == F16 ? 0xFFFFE000 : 0xFFFFFFFF;
  static INLINE U cut(U u) {
    if constexpr (TARGET == BF16) return u >> 16;
    else if constexpr (TARGET == F16) return ((((u & ABS) - BIAS) >> 13) | ((u >> 16) & SIGN16)) & 0xFFFF;
    else return u;
  }

  static INLINE U longer(H s) {
#if defined(__AVX512F__)  // which gcc 12 does in four steps
    if constexpr (sizeof s == 32) return (U)_mm512_cvtepu16_epi32((__m256i)s);
#endif
    return __builtin_convertvector(s, U);
  }

  static INLINE F widen(Stored s) {
    if constexpr (SOURCE == F32) return bits<F>(s);
    else if constexpr (SOURCE == BF16) return of_bf16<F, U>(longer(s));
    else return of_f16<F, U>(longer(s));
  }

  // What a stored value would be without an update; not for NaN, which is always in doubt.
  static INLINE U unmerged(Stored s, F w) {
    if constexpr (TARGET == F32) return bits<U>(w);
    else if constexpr (SOURCE == TARGET) return longer(s);
    else if constexpr (TARGET == BF16) return to_bf16<F, U>(w);
    else return to_any_f16<F, U>(w);
  }

  // Round W + d for the first n of some elements, the first of which is element k, and return where that may not be
  // what the exact sum rounds to, one bit for each.
  static INLINE uint64_t decide(const Job& job, int64_t k, int64_t n, R d, R error, R slack, Tally<V>& tally) {
    const char* from = (const char*)job.x + k * (SOURCE == F32 ? 4 : 2);
    char* to = (char*)job.out + k * (TARGET == F32 ? 4 : 2);
    Stored s{};
    if (n == SIZE) s = load<Stored>(from);
    else std::memcpy(&s, from, n * sizeof s[0]);
    for (int64_t k = n; k < SIZE; k++) d[k] = 0;  // no columns, but 0 times an infinite factor
    const F w = widen(s), change = __builtin_convertvector(d, F);
    const R v = __builtin_convertvector(w, R) + d;
    const R size = bits<R>((typename V::Mask)(bits<typename V::Mask>(v) & V::MAGNITUDE));
    const R e = fused(size, slack, error);
    const U high = bits<U>(__builtin_convertvector(v + e, F)) + HALF;
    const U low = bits<U>(__builtin_convertvector(v - e, F)) + HALF;
    const U place = bits<U>(__builtin_convertvector(v, F)) & ABS;
    // ends of different signs differ in their signs; an e that is NaN decides nothing either
    const I bad = (I)(((high ^ low) & KEPT) != 0) | (I)(place - LEAST[TARGET] >= SPAN[TARGET]) |
                  ~__builtin_convertvector(e < size, I);
    const U y = cut(high);
    const Result result = __builtin_convertvector(y, Result);
    if (n == SIZE) store(to, result);
    else std::memcpy(to, &result, n * sizeof result[0]);
    tally.of_w = fused(w, w, tally.of_w);
    tally.of_d = fused(change, change, tally.of_d);
    tally.num_updated -= __builtin_convertvector(d != 0, I);
    tally.num_changed -= (I)(y != unmerged(s, w)) & ~bad;
    return marks(bad) & (~0ull >> (64 - n));
  }

  // Merge n columns, at most two vectors of them, of up to ROWS rows; return how many places are in doubt then.
  template <bool WHOLE>
  static INLINE int64_t merge(const Job& job, int64_t row, int64_t j, int64_t n, int64_t* places, int64_t num_places,
                              Tally<V>& tally) {
    R d[ROWS][2];
    products(job, row, j, d);
    const R first = load<R>((const Real*)job.columns + j), second = load<R>((const Real*)job.columns + j + SIZE);
    const R slack = broadcast((Real)job.slack);
    const int64_t num_rows = job.num_rows - row < ROWS ? job.num_rows - row : ROWS;
    for (int64_t p = 0; p < num_rows; p++) {
      const R bound = broadcast(((const Real*)job.bound)[row + p]);
      const int64_t k = (row + p) * job.width + j;
      // the rows after these, from wherever the thread that read them left them
      __builtin_prefetch((const char*)job.x + (k + ROWS * job.width) * (SOURCE == F32 ? 4 : 2), 0, 2);
      __builtin_prefetch((char*)job.out + (k + ROWS * job.width) * (TARGET == F32 ? 4 : 2), 1, 2);
      uint64_t unsure = decide(job, k, WHOLE || n > SIZE ? SIZE : n, d[p][0], bound * first, slack, tally);
      if (WHOLE || n > SIZE)
        unsure |= decide(job, k + SIZE, WHOLE ? SIZE : n - SIZE, d[p][1], bound * second, slack, tally) << SIZE;
      for (; __builtin_expect(unsure != 0, 0); unsure &= unsure - 1) places[num_places++] = k + __builtin_ctzll(unsure);
    }
    return num_places;
  }

  static void merge(const Job& job) {
    int64_t places[PLACES + ROWS * PAIR], num_places = 0;
    for (int64_t column = 0; column < job.width; column += TILE) {
      const int64_t end = column + TILE < job.width ? column + TILE : job.width;
      for (int64_t row = 0; row < job.num_rows; row += ROWS) {
        Tally<V> tally;
        for (int64_t j = column; j < end; j += PAIR) {
          num_places = j + PAIR <= end ? merge<true>(job, row, j, PAIR, places, num_places, tally)
                                       : merge<false>(job, row, j, end - j, places, num_places, tally);
          if (num_places >= PLACES) {
            settle<SOURCE, TARGET>(job, places, num_places);
            num_places = 0;
          }
        }
        tally.add_to(job.found);
      }
    }
    settle<SOURCE, TARGET>(job, places, num_places);
  }
};

template <Format SOURCE, Format TARGET> void convert(const void* x, void* out, int64_t n) {
  for (int64_t k = 0; k < n; k++) {
    const float w = widened<SOURCE>(x, k);
    if constexpr (TARGET == F16) put<TARGET>(out, k, rounded<TARGET>(w));
    else if constexpr (TARGET == BF16) put<TARGET>(out, k, w == w ? to_bf16<float, uint32_t>(w) : NAN_OF[TARGET]);
    else put<TARGET>(out, k, w == w ? bits<uint32_t>(w) : NAN_OF[TARGET]);
  }
}

template <Format TARGET> void convert_doubles(const double* x, void* out, int64_t n) {
  for (int64_t k = 0; k < n; k++) put<TARGET>(out, k, rounded<TARGET>(x[k]));
}

// Call one of the instances of a template for two formats.
#define BY_FORMATS(source, target, CALL)                 \
  switch (3 * (source) + (target)) {                     \
    case 0: return CALL(BF16, BF16);                     \
    case 1: return CALL(BF16, F16);                      \
    case 2: return CALL(BF16, F32);                      \
    case 3: return CALL(F16, BF16);                      \
    case 4: return CALL(F16, F16);                       \
    case 5: return CALL(F16, F32);                       \
    case 6: return CALL(F32, BF16);                      \
    case 7: return CALL(F32, F16);                       \
    case 8: return CALL(F32, F32);                       \
  }

}  // namespace

EXPORTED void JOIN(merge, LEVEL)(int source, int target, const Job* job) {
#define MERGE(S, T) Pass<S, T>::merge(*job)
  BY_FORMATS(source, target, MERGE)
}

EXPORTED void JOIN(convert, LEVEL)(int source, int target, const void* x, void* out, int64_t n) {
#define CONVERT(S, T) convert<S, T>(x, out, n)
  BY_FORMATS(source, target, CONVERT)
}

EXPORTED void JOIN(convert_doubles, LEVEL)(int target, const double* x, void* out, int64_t n) {
  switch (target) {
    case BF16: return convert_doubles<BF16>(x, out, n);
    case F16: return convert_doubles<F16>(x, out, n);
    case F32: return convert_doubles<F32>(x, out, n);
  }
}
