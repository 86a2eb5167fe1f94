// SHA-256 (FIPS 180-4) of the same bytes as parts of two messages, on processors with instructions for it.
//
// One message keeps these instructions waiting for their own results; two, taken in turns, take little more than half of
// the time that they take one after the other. Linux does the same for dm-verity (sha256_finup_2x).

#if defined(__x86_64__) || defined(__aarch64__)

#if defined(__x86_64__)
#include <immintrin.h>
#else
#include <arm_neon.h>
#endif

#include <cstdint>
#include <cstring>

#define EXPORTED extern "C" __attribute__((visibility("default")))
#define INLINE __attribute__((always_inline)) inline

namespace {

using std::size_t;
using std::uint32_t;
using std::uint64_t;
using std::uint8_t;

constexpr size_t BLOCK = 64;

// The first 32 bits of the fractions of the cube roots of the first 64 primes.
alignas(16) constexpr uint32_t K[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

// A message so far; see `Message` in __init__.py.
struct State {
  uint32_t h[8];
  uint64_t num_bytes;
  uint8_t rest[BLOCK];  // what came after the last whole block
};

#if defined(__x86_64__)

// Put the words of a block into w.
INLINE void load(__m128i (&w)[4], const uint8_t* block) {
  const __m128i swap = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
  for (int k = 0; k < 4; k++) w[k] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)(block + 16 * k)), swap);
}

// Put the words of rounds 4k to 4k + 3 into `to`, with their constants, and make of w what the next rounds need.
INLINE void take(__m128i (&w)[4], int k, __m128i& to) {
  to = _mm_add_epi32(w[k % 4], _mm_load_si128((const __m128i*)(K + 4 * k)));
  if (k < 12) {
    const __m128i last = w[(k + 3) % 4], before = _mm_alignr_epi8(last, w[(k + 2) % 4], 4);
    const __m128i sum = _mm_add_epi32(_mm_sha256msg1_epu32(w[k % 4], w[(k + 1) % 4]), before);
    w[k % 4] = _mm_sha256msg2_epu32(sum, last);
  }
}

// Hash as many blocks of each of N messages. While the rounds of a block wait for their own results, the words of the
// next block are made.
template <int N> void compress(State* const (&states)[N], const uint8_t* const (&data)[N], size_t num_blocks) {
  if (!num_blocks) return;
  __m128i s0[N], s1[N];  // ABEF and CDGH
  for (int n = 0; n < N; n++) {
    const __m128i low = _mm_loadu_si128((const __m128i*)states[n]->h);
    const __m128i high = _mm_loadu_si128((const __m128i*)(states[n]->h + 4));
    const __m128i cdab = _mm_shuffle_epi32(low, 0xB1), efgh = _mm_shuffle_epi32(high, 0x1B);
    s0[n] = _mm_alignr_epi8(cdab, efgh, 8);
    s1[n] = _mm_blend_epi16(efgh, cdab, 0xF0);
  }
  __m128i w[N][4], ready[2][16][N];  // of this block and of the next one, in turns
  for (int n = 0; n < N; n++) load(w[n], data[n]);
#pragma GCC unroll 16
  for (int k = 0; k < 16; k++)
    for (int n = 0; n < N; n++) take(w[n], k, ready[0][k][n]);
  for (size_t block = 0; block < num_blocks; block++) {
    __m128i before0[N], before1[N];
    for (int n = 0; n < N; n++) before0[n] = s0[n], before1[n] = s1[n];
    const __m128i(&now)[16][N] = ready[block % 2];
    __m128i(&next)[16][N] = ready[(block + 1) % 2];
    const size_t following = block + 1 < num_blocks ? block + 1 : block;
    for (int n = 0; n < N; n++) load(w[n], data[n] + BLOCK * following);
#pragma GCC unroll 16
    for (int k = 0; k < 16; k++) {  // four rounds each
      for (int n = 0; n < N; n++) {
        s1[n] = _mm_sha256rnds2_epu32(s1[n], s0[n], now[k][n]);
        s0[n] = _mm_sha256rnds2_epu32(s0[n], s1[n], _mm_loadl_epi64((const __m128i*)((const uint64_t*)&now[k][n] + 1)));
        take(w[n], k, next[k][n]);
      }
    }
    for (int n = 0; n < N; n++) {
      s0[n] = _mm_add_epi32(s0[n], before0[n]);
      s1[n] = _mm_add_epi32(s1[n], before1[n]);
    }
  }
  for (int n = 0; n < N; n++) {
    const __m128i feba = _mm_shuffle_epi32(s0[n], 0x1B), dchg = _mm_shuffle_epi32(s1[n], 0xB1);
    _mm_storeu_si128((__m128i*)states[n]->h, _mm_blend_epi16(feba, dchg, 0xF0));
    _mm_storeu_si128((__m128i*)(states[n]->h + 4), _mm_alignr_epi8(dchg, feba, 8));
  }
}

#else

template <int N> void compress(State* const (&states)[N], const uint8_t* const (&data)[N], size_t num_blocks) {
  uint32x4_t abcd[N], efgh[N];
  for (int n = 0; n < N; n++) abcd[n] = vld1q_u32(states[n]->h), efgh[n] = vld1q_u32(states[n]->h + 4);
  for (size_t block = 0; block < num_blocks; block++) {
    uint32x4_t before0[N], before1[N], w[N][4];
    for (int n = 0; n < N; n++) {
      before0[n] = abcd[n], before1[n] = efgh[n];
      for (int k = 0; k < 4; k++)
        w[n][k] = vreinterpretq_u32_u8(vrev32q_u8(vld1q_u8(data[n] + BLOCK * block + 16 * k)));
    }
#pragma GCC unroll 16
    for (int k = 0; k < 16; k++) {  // four rounds each
      for (int n = 0; n < N; n++) {
        const uint32x4_t sum = vaddq_u32(w[n][k % 4], vld1q_u32(K + 4 * k)), last = abcd[n];
        abcd[n] = vsha256hq_u32(last, efgh[n], sum);
        efgh[n] = vsha256h2q_u32(efgh[n], last, sum);
        if (k < 12)
          w[n][k % 4] = vsha256su1q_u32(vsha256su0q_u32(w[n][k % 4], w[n][(k + 1) % 4]), w[n][(k + 2) % 4],
                                        w[n][(k + 3) % 4]);
      }
    }
    for (int n = 0; n < N; n++) {
      abcd[n] = vaddq_u32(abcd[n], before0[n]);
      efgh[n] = vaddq_u32(efgh[n], before1[n]);
    }
  }
  for (int n = 0; n < N; n++) vst1q_u32(states[n]->h, abcd[n]), vst1q_u32(states[n]->h + 4, efgh[n]);
}

#endif

// What is left of some bytes that are being added to a message.
struct Input {
  State* state;
  const uint8_t* data;
  size_t size;

  // Complete the block that the message ends in; what is left then begins with a block.
  Input(State* state, const uint8_t* data, size_t size) : state(state), data(data), size(size) {
    const size_t begun = state->num_bytes % BLOCK;
    state->num_bytes += size;
    if (!begun) return;
    const size_t part = size < BLOCK - begun ? size : BLOCK - begun;
    std::memcpy(state->rest + begun, data, part);
    this->data += part, this->size -= part;
    if (begun + part == BLOCK) compress<1>({state}, {state->rest}, 1);
  }

  void take(size_t num_blocks) { data += num_blocks * BLOCK, size -= num_blocks * BLOCK; }

  void finish() {
    const size_t num_blocks = size / BLOCK;
    compress<1>({state}, {data}, num_blocks);
    take(num_blocks);
    if (size) std::memcpy(state->rest, data, size);
  }
};

}  // namespace

EXPORTED void sha256_update(State* state, const uint8_t* data, size_t size) { Input(state, data, size).finish(); }

EXPORTED void sha256_update_both(State* one, State* other, const uint8_t* data, size_t size) {
  Input a(one, data, size), b(other, data, size);
  const size_t num_blocks = (a.size < b.size ? a.size : b.size) / BLOCK;
  compress<2>({a.state, b.state}, {a.data, b.data}, num_blocks);
  a.take(num_blocks), b.take(num_blocks);
  a.finish(), b.finish();
}

// Put the digest of a whole message, 32 bytes, into out; the message may go on after that.
EXPORTED void sha256_digest(const State* state, uint8_t* out) {
  State last = *state;
  const size_t begun = state->num_bytes % BLOCK;
  uint8_t end[2 * BLOCK] = {0x80};  // a bit, and zeros up to the length at the end of a block
  const size_t size = (begun < BLOCK - 8 ? BLOCK : 2 * BLOCK) - begun;
  for (int k = 0; k < 8; k++) end[size - 1 - k] = (uint8_t)(state->num_bytes * 8 >> 8 * k);
  Input(&last, end, size).finish();
  for (int k = 0; k < 32; k++) out[k] = (uint8_t)(last.h[k / 4] >> (24 - 8 * (k % 4)));
}

#endif
