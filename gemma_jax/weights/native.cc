// Products of few rows of float32 activations with weights as they are stored, called by XLA (jax.ffi).
//
// A product of one row is limited by the speed at which the weight is read. So a weight is read once, in the
// order in which it is in memory, and converted in registers. The work is divided into tiles of columns and of
// contracted elements; threads of XLA's own pool take one tile after the other. Which tiles there are depends
// only on shapes, so a result does not depend on the number of threads.
//
// Matrices are [layers, C, O], with a number that selects the layer. Integers are [layers, K, G, O]: element c
// of the contracted axis is number c % K of block c / K. Tables (tied embeddings) are [V, D], and are multiplied
// row by row. Activations are [R, C].
//
// With AVX2, most columns are multiplied by vectors; the plain loops do the rest, or everything without AVX2.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "xla/ffi/api/ffi.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define VECTORS 1
#else
#define VECTORS 0
#endif

namespace {

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;
using std::int64_t;

// ---- threads -----------------------------------------------------------------------------------------------

// Calls run(i) for all i below count, on this thread and those of the pool. A thread of the pool that begins
// too late finds nothing to do, so this never waits for a thread that has not begun.
template <class Run>
void parallel(ffi::ThreadPool& pool, int64_t count, const Run& run) {
  struct Progress {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto progress = std::make_shared<Progress>();
  auto work = [progress, count, &run] {
    for (int64_t i; (i = progress->next.fetch_add(1)) < count;) {
      run(i);
      progress->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t helper = 1; helper < std::min(count, pool.num_threads()); ++helper) {
    auto copy = work;
    pool.Schedule(std::move(copy));
  }
  work();
  for (int spins = 0; progress->done.load(std::memory_order_acquire) < count; ++spins) {
    if (spins > 10000) std::this_thread::yield();
  }
}

// ---- the tiles of a matrix ---------------------------------------------------------------------------------

constexpr int64_t kMostRows = 16;         // in one pass over the weights
constexpr int64_t kWidest = 4096;         // columns of a tile with one row; fewer rows of sums stay in the cache
constexpr int64_t kTileBytes = 128 << 10; // smaller tiles are not worth a thread's attention
constexpr int64_t kTilesAThread = 4;      // enough to share evenly; more would only cost sums

struct Tiles {
  int64_t width, strips;  // columns
  int64_t depth, splits;  // contracted units
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Tiles tiles_of(int64_t threads, int64_t rows, int64_t units, int64_t outputs, int64_t bytes) {
  Tiles t;
  int64_t widest = kWidest;
  for (int64_t more = 1; more < rows; more *= 2) widest /= 2;
  t.strips = ceil_div(outputs, widest);
  t.width = ceil_div(ceil_div(outputs, t.strips), 64) * 64;
  t.strips = ceil_div(outputs, t.width);
  const int64_t wanted = std::clamp<int64_t>(bytes / kTileBytes, 1, kTilesAThread * threads);
  t.depth = ceil_div(units, std::clamp<int64_t>(wanted / t.strips, 1, units));
  t.splits = ceil_div(units, t.depth);
  return t;
}

// Calls tile(row, rows, unit, end, column, end, sums) for all tiles of at most kMostRows rows, which sets `sums`
// [rows, columns] with rows of `outputs`; then adds up the sums of the parts of the contracted axis.
template <class Tile>
void multiply_tiles(ffi::ThreadPool& pool, int64_t all_rows, int64_t units, int64_t outputs, int64_t bytes,
                    float* out, const Tile& tile) {
  static thread_local std::vector<float> partial;
  for (int64_t row = 0; row < all_rows; row += kMostRows, out += kMostRows * outputs) {
    const int64_t rows = std::min(kMostRows, all_rows - row);
    const Tiles t = tiles_of(pool.num_threads(), rows, units, outputs, bytes);
    if (t.splits > 1) partial.resize(t.splits * rows * outputs);
    float* sums = t.splits > 1 ? partial.data() : out;
    parallel(pool, t.strips * t.splits, [&](int64_t i) {
      const int64_t split = i % t.splits, column = i / t.splits * t.width;
      tile(row, rows, split * t.depth, std::min(units, (split + 1) * t.depth), column,
           std::min(outputs, column + t.width), sums + split * rows * outputs + column);
    });
    if (t.splits == 1) continue;
    std::memcpy(out, sums, rows * outputs * sizeof(float));
    for (int64_t split = 1; split < t.splits; ++split) {
      const float* part = sums + split * rows * outputs;
      for (int64_t i = 0; i < rows * outputs; ++i) out[i] += part[i];
    }
  }
}

// ---- floating-point numbers --------------------------------------------------------------------------------

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

float to_float(float x) { return x; }
float to_float(BF16 x) { return from_bits(uint32_t{x.bits} << 16); }
float to_float(F16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return from_bits(sign | 0x7f800000u | (rest & 0x3ffu) << 13);  // infinite or NaN
  if (rest < 0x400u) return from_bits(sign | 0x33800000u) * rest;  // subnormal: multiples of 2^-24
  return from_bits(sign | ((rest << 13) + 0x38000000u));
}

#if VECTORS
// Sixteen numbers as two vectors: in order, except that of bfloat16 those with even and those with odd index
// are apart, because this is the quickest. `store16` restores the order.
void load16(const float* p, __m256& a, __m256& b) { a = _mm256_loadu_ps(p), b = _mm256_loadu_ps(p + 8); }
void load16(const F16* p, __m256& a, __m256& b) {
  a = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  b = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)));
}
void load16(const BF16* p, __m256& a, __m256& b) {
  const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  a = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
  b = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(0xffff0000)));
}

template <class T>
void store16(float* to, const float* sums) {
  __m256 a = _mm256_loadu_ps(sums), b = _mm256_loadu_ps(sums + 8);
  if (std::is_same_v<T, BF16>) {
    const __m256 low = _mm256_unpacklo_ps(a, b), high = _mm256_unpackhi_ps(a, b);
    a = _mm256_permute2f128_ps(low, high, 0x20), b = _mm256_permute2f128_ps(low, high, 0x31);
  }
  _mm256_storeu_ps(to, a), _mm256_storeu_ps(to + 8, b);
}

// Brings the line of memory at p into the cache. Memory that nobody may read is left alone.
void fetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

float total(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
#endif

// The sums of one tile of a matrix w [C, O]: elements [begin, end) of C, columns [from, to) of O.
template <class T>
void dense_tile(const float* x, int64_t rows, int64_t inputs, const T* w, int64_t outputs, int64_t begin,
                int64_t end, int64_t from, int64_t to, float* out) {
  const int64_t width = to - from, vectors = VECTORS ? width / 16 * 16 : 0;
  alignas(64) float sums[kWidest];
  std::fill_n(sums, rows * width, 0.0f);
#if VECTORS
  for (int64_t c = begin; c < end; c += 4) {
    // At the end of the tile the last row of w is taken again, with zeros.
    const T* row[4];
    for (int i = 0; i < 4; ++i) row[i] = w + std::min(c + i, end - 1) * outputs + from;
    alignas(16) float xs[kMostRows][4];
    for (int64_t r = 0; r < rows; ++r) {
      for (int i = 0; i < 4; ++i) xs[r][i] = c + i < end ? x[r * inputs + c + i] : 0.0f;
    }
    const int64_t ahead = 4 * outputs;
    for (int64_t j = 0; j < vectors; j += 16) {
      __m256 a[4], b[4];
      for (int i = 0; i < 4; ++i) {
        load16(row[i] + j, a[i], b[i]);
        fetch(row[i] + j + ahead);
      }
      for (int64_t r = 0; r < rows; ++r) {
        float* at = sums + r * width + j;
        __m256 s = _mm256_loadu_ps(at), t = _mm256_loadu_ps(at + 8);
        for (int i = 0; i < 4; ++i) {
          const __m256 factor = _mm256_broadcast_ss(&xs[r][i]);
          s = _mm256_fmadd_ps(a[i], factor, s);
          t = _mm256_fmadd_ps(b[i], factor, t);
        }
        _mm256_storeu_ps(at, s), _mm256_storeu_ps(at + 8, t);
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < vectors; j += 16) store16<T>(out + r * outputs + j, sums + r * width + j);
  }
#endif
  for (int64_t c = begin; c < end && vectors < width; ++c) {
    for (int64_t r = 0; r < rows; ++r) {
      const float factor = x[r * inputs + c];
      for (int64_t j = vectors; j < width; ++j) {
        sums[r * width + j] += to_float(w[c * outputs + from + j]) * factor;
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    std::copy(sums + r * width + vectors, sums + (r + 1) * width, out + r * outputs + vectors);
  }
}

// ---- integers ----------------------------------------------------------------------------------------------

// Activations as integers, each segment of a row with its own scale. Beside int8 weights they have 16 bits, so
// that their rounding does not count, and beside int4 weights 8, as in llama.cpp. A sum of products over a
// segment fits the integers that add it up: 256 * 2^15 * 2^7 < 2^31, 32 * 127 * 8 < 2^15.
template <class Q>
struct Activations {
  static constexpr int64_t kSegment = sizeof(Q) == 2 ? 256 : 32;
  int64_t segment, segments;
  std::vector<Q> q;          // [R, segments, segment], zeros at the end
  std::vector<float> scale;  // [R, segments]
  std::vector<int32_t> sum;  // [R, segments]: of q

  const Q* at(int64_t r, int64_t s) const { return q.data() + (r * segments + s) * segment; }

  void round(const float* x, int64_t rows, int64_t inputs, int64_t most) {
    segment = most, segments = ceil_div(inputs, most);
    q.assign(rows * segments * segment, 0);
    scale.resize(rows * segments), sum.resize(rows * segments);
    constexpr float largest = sizeof(Q) == 2 ? 32767 : 127;
    for (int64_t i = 0; i < rows * segments; ++i) {
      const int64_t r = i / segments, first = i % segments * segment;
      const float* from = x + r * inputs + first;
      const int64_t n = std::min(segment, inputs - first);
      // Eight at a time, which compilers turn into vectors. `bad` becomes NaN if a number is not finite.
      float most_of[8] = {}, bad[8] = {};
      for (int64_t j = 0; j < n; ++j) {
        most_of[j % 8] = std::max(most_of[j % 8], std::fabs(from[j]));
        bad[j % 8] += from[j] * 0.0f;
      }
      float absmax = 0, not_finite = 0;
      for (int j = 0; j < 8; ++j) absmax = std::max(absmax, most_of[j]), not_finite += bad[j];
      const bool usable = absmax > 0 && not_finite == 0;
      const float factor = usable ? largest / absmax : 0.0f;
      Q* to = q.data() + i * segment;
      int32_t added = 0;
      for (int64_t j = 0; j < n && usable; ++j) {
        // The sum of 3 * 2^22 and a small number has that number's integer in its last bits.
        const float shifted = from[j] * factor + 12582912.0f;
        int32_t bits;
        std::memcpy(&bits, &shifted, sizeof bits);
        to[j] = static_cast<Q>(bits - 0x4b400000), added += to[j];
      }
      scale[i] = absmax / largest + not_finite, sum[i] = added;
    }
  }
};

int code(const int8_t* codes, int64_t i) { return codes[i]; }

struct Nibble;  // two to a byte, the first one in the lower half
int code(const Nibble* codes, int64_t i) {
  const int byte = reinterpret_cast<const uint8_t*>(codes)[i / 2];
  return ((i % 2 ? byte >> 4 : byte & 15) ^ 8) - 8;
}

const int8_t* address(const int8_t* codes, int64_t i) { return codes + i; }
const uint8_t* address(const Nibble* codes, int64_t i) {
  return reinterpret_cast<const uint8_t*>(codes) + i / 2;
}

#if VECTORS
__m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
void store(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

// How four rows of codes are multiplied by four activations. `prepare` makes eight vectors of kColumns columns
// of them: in the first four each column has codes of the first two rows beside each other, in the others of
// the last two. `factors` is two activations as a vector repeats them. `flush` calls use(column, eight sums)
// for sums in the order of the vectors.
template <class Code>
struct Kernel;

template <>
struct Kernel<int8_t> {
  using Q = int16_t;
  using Sum = int32_t;
  static constexpr int64_t kColumns = 32;
  static Sum initial(int32_t) { return 0; }

  static void prepare(const int8_t* const row[4], __m256i w[8]) {
    for (int half = 0; half < 2; ++half) {
      __m256i v[4];
      for (int i = 0; i < 4; ++i) {
        v[i] = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row[i] + 16 * half)));
      }
      for (int i = 0; i < 2; ++i) {
        w[4 * i + 2 * half] = _mm256_unpacklo_epi16(v[2 * i], v[2 * i + 1]);
        w[4 * i + 2 * half + 1] = _mm256_unpackhi_epi16(v[2 * i], v[2 * i + 1]);
      }
    }
  }
  static int32_t factors(const Q* q) {
    int32_t two;
    std::memcpy(&two, q, sizeof two);
    return two;
  }
  static __m256i multiply(__m256i w, __m256i x) { return _mm256_madd_epi16(w, x); }
  static __m256i plus(__m256i a, __m256i b) { return _mm256_add_epi32(a, b); }

  template <class Use>
  static void flush(const Sum* sums, const Use& use) {
    for (int half = 0; half < 2; ++half) {
      const __m256i a = load(sums + 16 * half), b = load(sums + 16 * half + 8);
      use(16 * half, _mm256_cvtepi32_ps(_mm256_permute2x128_si256(a, b, 0x20)));
      use(16 * half + 8, _mm256_cvtepi32_ps(_mm256_permute2x128_si256(a, b, 0x31)));
    }
  }
};

template <>
struct Kernel<Nibble> {
  using Q = int8_t;
  using Sum = int16_t;
  static constexpr int64_t kColumns = 64;
  // The codes are multiplied plus 8, because the instruction wants them without a sign. Sums may overflow on
  // the way, but the last one is right.
  static Sum initial(int32_t sum) { return static_cast<Sum>(-8 * sum); }

  static void prepare(const uint8_t* const row[4], __m256i w[8]) {
    const __m256i low = _mm256_set1_epi8(15), flip = _mm256_set1_epi8(static_cast<char>(0x88));
    for (int i = 0; i < 2; ++i) {
      const __m256i a = _mm256_xor_si256(load(row[2 * i]), flip);
      const __m256i b = _mm256_xor_si256(load(row[2 * i + 1]), flip);
      for (int half = 0; half < 2; ++half) {
        const __m256i both = half ? _mm256_unpackhi_epi8(a, b) : _mm256_unpacklo_epi8(a, b);
        w[4 * i + 2 * half] = _mm256_and_si256(both, low);
        w[4 * i + 2 * half + 1] = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
      }
    }
  }
  static int32_t factors(const Q* q) {
    uint16_t two;
    std::memcpy(&two, q, sizeof two);
    return two * 0x10001u;
  }
  static __m256i multiply(__m256i w, __m256i x) { return _mm256_maddubs_epi16(w, x); }
  static __m256i plus(__m256i a, __m256i b) { return _mm256_add_epi16(a, b); }

  template <class Use>
  static void flush(const Sum* sums, const Use& use) {
    for (int half = 0; half < 2; ++half) {
      const __m256i even = load(sums + 32 * half), odd = load(sums + 32 * half + 16);
      for (int high = 0; high < 2; ++high) {
        const __m256i v = high ? _mm256_unpackhi_epi16(even, odd) : _mm256_unpacklo_epi16(even, odd);
        const int64_t column = 16 * half + 8 * high;
        use(column, _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm256_castsi256_si128(v))));
        use(column + 32, _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm256_extracti128_si256(v, 1))));
      }
    }
  }
};

__m256 load8(const float* p) { return _mm256_loadu_ps(p); }
__m256 load8(const BF16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
#endif

// Integers [K, G, O] of one layer, with scales [G, O], or [1, O] where G * K elements share one.
template <class Code, class Scale>
struct Matrix {
  const Code* codes;
  const Scale* scales;
  int64_t block, blocks, outputs;
  bool in_blocks;

  int64_t row(int64_t c) const { return in_blocks ? (c % block * blocks + c / block) : c; }
  int64_t stride() const { return in_blocks ? blocks : 1; }  // from one row to the next of a block
  const Scale* scale(int64_t c) const { return scales + (in_blocks ? c / block * outputs : 0); }
};

// The sums of one tile: segments [begin, end) of the activations, columns [from, to) of O.
template <class Code, class Scale, class Q>
void integer_tile(const Activations<Q>& x, int64_t row, int64_t rows, int64_t inputs, const Matrix<Code, Scale>& m,
                  int64_t begin, int64_t end, int64_t from, int64_t to, float* out) {
  const int64_t width = to - from;
  int64_t vectors = 0;
  alignas(64) float floats[kWidest];
  alignas(64) int32_t plain[kWidest];
  std::fill_n(floats, rows * width, 0.0f);
#if VECTORS
  using K = Kernel<Code>;
  static_assert(std::is_same_v<Q, typename K::Q>);
  alignas(64) typename K::Sum sums[kWidest];
  // A vector of nibbles begins at a byte.
  if (std::is_same_v<Code, int8_t> || m.outputs % 2 == 0) vectors = width / K::kColumns * K::kColumns;
#endif
  for (int64_t s = begin; s < end; ++s) {
    const int64_t first = s * x.segment, count = std::min(x.segment, inputs - first);
    const Scale* scale = m.scale(first) + from;
#if VECTORS
    for (int64_t r = 0; r < rows && vectors; ++r) {
      std::fill_n(sums + r * width, vectors, K::initial(x.sum[(row + r) * x.segments + s]));
    }
    for (int64_t c = 0; c < count && vectors; c += 4) {
      // At the end of a segment its last row is taken again, with zeros.
      decltype(address(m.codes, 0)) line[4], at[4];
      for (int i = 0; i < 4; ++i) {
        const int64_t number = m.row(first) + std::min(c + i, count - 1) * m.stride();
        line[i] = address(m.codes, number * m.outputs + from);
      }
      int32_t factors[kMostRows][2];
      for (int64_t r = 0; r < rows; ++r) {
        for (int i = 0; i < 2; ++i) factors[r][i] = K::factors(x.at(row + r, s) + c + 2 * i);
      }
      const int64_t ahead = address(m.codes, 4 * m.stride() * m.outputs) - address(m.codes, 0);
      for (int64_t j = 0; j < vectors; j += K::kColumns) {
        for (int i = 0; i < 4; ++i) {
          at[i] = line[i] + (address(m.codes, j) - address(m.codes, 0));
          if (j % 128 == 0 || !std::is_same_v<Code, Nibble>) fetch(at[i] + ahead);
        }
        __m256i w[8];
        K::prepare(at, w);
        for (int64_t r = 0; r < rows; ++r) {
          const __m256i x0 = _mm256_set1_epi32(factors[r][0]), x1 = _mm256_set1_epi32(factors[r][1]);
          auto* sum = sums + r * width + j;
          for (int i = 0; i < 4; ++i) {
            auto* to = sum + i * (32 / sizeof *sum);
            const __m256i both = K::plus(K::multiply(w[i], x0), K::multiply(w[4 + i], x1));
            store(to, K::plus(load(to), both));
          }
        }
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      const __m256 factor = _mm256_set1_ps(x.scale[(row + r) * x.segments + s]);
      for (int64_t j = 0; j < vectors; j += K::kColumns) {
        K::flush(sums + r * width + j, [&](int64_t column, __m256 v) {
          float* at = floats + r * width + j + column;
          const __m256 f = m.in_blocks ? _mm256_mul_ps(factor, load8(scale + j + column)) : factor;
          _mm256_storeu_ps(at, _mm256_fmadd_ps(v, f, _mm256_loadu_ps(at)));
        });
      }
    }
#endif
    if (vectors == width) continue;
    std::fill_n(plain, rows * width, 0);
    for (int64_t c = 0; c < count; ++c) {
      const int64_t number = (m.row(first) + c * m.stride()) * m.outputs + from;
      for (int64_t r = 0; r < rows; ++r) {
        const int32_t factor = x.at(row + r, s)[c];
        for (int64_t j = vectors; j < width; ++j) plain[r * width + j] += code(m.codes, number + j) * factor;
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      const float factor = x.scale[(row + r) * x.segments + s];
      for (int64_t j = vectors; j < width; ++j) {
        const float f = m.in_blocks ? factor * to_float(scale[j]) : factor;
        floats[r * width + j] += static_cast<float>(plain[r * width + j]) * f;
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < width; ++j) {
      const float sum = floats[r * width + j];
      out[r * m.outputs + j] = m.in_blocks ? sum : sum * to_float(m.scales[from + j]);
    }
  }
}

// ---- tables ------------------------------------------------------------------------------------------------

constexpr int64_t kTableRows = 4;    // of a table that are multiplied at once
constexpr int64_t kTableTile = 256;  // that one thread takes

// Dots of a table [V, D] of floating-point numbers.
template <class T>
struct DenseTable {
  const float *x, *ordered;  // [R, D]; `ordered` has the order of load16
  const T* table;
  int64_t size;

  float rest(int64_t r, int64_t v, int64_t from) const {
    float sum = 0;
    for (int64_t d = from; d < size; ++d) sum += to_float(table[v * size + d]) * x[r * size + d];
    return sum;
  }
#if VECTORS
  template <int R>
  void dots(int64_t row, const int64_t v[kTableRows], float out[][kTableRows]) const {
    const float* rows_of_x[R];
    for (int r = 0; r < R; ++r) rows_of_x[r] = ordered + (row + r) * size;
    const T* w[kTableRows];
    for (int i = 0; i < kTableRows; ++i) w[i] = table + v[i] * size;
    __m256 sums[R][kTableRows];
    for (auto& of_row : sums) std::fill_n(of_row, kTableRows, _mm256_setzero_ps());
    for (int64_t d = 0; d + 16 <= size; d += 16) {
      for (int i = 0; i < kTableRows; ++i) {
        __m256 a, b;
        if (d * sizeof(T) % 64 == 0) fetch(w[i] + d + kTableRows * size);
        load16(w[i] + d, a, b);
        for (int r = 0; r < R; ++r) {
          const float* at = rows_of_x[r] + d;
          sums[r][i] = _mm256_fmadd_ps(a, _mm256_loadu_ps(at), sums[r][i]);
          sums[r][i] = _mm256_fmadd_ps(b, _mm256_loadu_ps(at + 8), sums[r][i]);
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int i = 0; i < kTableRows; ++i) out[r][i] = total(sums[r][i]);
    }
  }
#endif
};

// The same of a table of int8, with a scale for each row. A vector adds up eight sums, so that segments of
// kTableSegment fit.
constexpr int64_t kTableSegment = 1024;

struct IntegerTable {
  const Activations<int16_t>& x;
  const int8_t* table;
  const float* scales;
  int64_t size;

  float rest(int64_t r, int64_t v, int64_t from) const {
    float sum = 0;
    for (int64_t s = from / x.segment; s < x.segments; ++s) {
      int64_t products = 0;
      for (int64_t d = std::max(from, s * x.segment); d < std::min(size, (s + 1) * x.segment); ++d) {
        products += table[v * size + d] * x.at(r, s)[d - s * x.segment];
      }
      sum += static_cast<float>(products) * x.scale[r * x.segments + s];
    }
    return sum * scales[v];
  }
#if VECTORS
  template <int R>
  void dots(int64_t row, const int64_t v[kTableRows], float out[][kTableRows]) const {
    for (int64_t s = 0; s < x.segments; ++s) {
      const int64_t first = s * x.segment, vectors = std::min(size - first, x.segment) / 16 * 16;
      const int16_t* q[R];
      for (int r = 0; r < R; ++r) q[r] = x.at(row + r, s);
      const int8_t* w[kTableRows];
      for (int i = 0; i < kTableRows; ++i) w[i] = table + v[i] * size + first;
      __m256i sums[R][kTableRows];
      for (auto& of_row : sums) std::fill_n(of_row, kTableRows, _mm256_setzero_si256());
      for (int64_t d = 0; d < vectors; d += 16) {
        for (int i = 0; i < kTableRows; ++i) {
          if (d % 64 == 0) fetch(w[i] + d + kTableRows * size);
          const __m256i codes =
              _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w[i] + d)));
          for (int r = 0; r < R; ++r) {
            sums[r][i] = _mm256_add_epi32(sums[r][i], _mm256_madd_epi16(codes, load(q[r] + d)));
          }
        }
      }
      for (int r = 0; r < R; ++r) {
        const float factor = x.scale[(row + r) * x.segments + s];
        for (int i = 0; i < kTableRows; ++i) {
          out[r][i] += total(_mm256_cvtepi32_ps(sums[r][i])) * factor * scales[v[i]];
        }
      }
    }
  }
#endif
};

// out [R, V] = activations times the transposed table.
template <class Table>
void multiply_table(ffi::ThreadPool& pool, const Table& t, int64_t rows, int64_t count, float* out) {
  const int64_t vectors = VECTORS ? t.size / 16 * 16 : 0;
  parallel(pool, ceil_div(count, kTableTile), [&](int64_t tile) {
    const int64_t end = std::min(count, (tile + 1) * kTableTile);
    for (int64_t first = tile * kTableTile; first < end; first += kTableRows) {
      int64_t v[kTableRows];
      for (int i = 0; i < kTableRows; ++i) v[i] = std::min(first + i, end - 1);
      for (int64_t r = 0; r < rows; r += 2) {
        const int64_t pair = std::min<int64_t>(2, rows - r);
        float found[2][kTableRows] = {};
#if VECTORS
        pair == 2 ? t.template dots<2>(r, v, found) : t.template dots<1>(r, v, found);
#endif
        for (int64_t i = 0; i < pair; ++i) {
          for (int j = 0; j < kTableRows; ++j) {
            const float rest = vectors < t.size ? t.rest(r + i, v[j], vectors) : 0.0f;
            out[(r + i) * count + v[j]] = found[i][j] + rest;
          }
        }
      }
    }
  });
}

// ---- what XLA calls ----------------------------------------------------------------------------------------

ffi::Error wrong(const char* what) { return ffi::Error::InvalidArgument(std::string("native.cc: ") + what); }

// Calls use(pointer) with the type of a buffer of floating-point numbers.
template <class Use>
ffi::Error with_floats(const ffi::AnyBuffer& buffer, const Use& use) {
  if (buffer.element_type() == ffi::F32) {
    use(static_cast<const float*>(buffer.untyped_data()));
  } else if (buffer.element_type() == ffi::BF16) {
    use(static_cast<const BF16*>(buffer.untyped_data()));
  } else if (buffer.element_type() == ffi::F16) {
    use(static_cast<const F16*>(buffer.untyped_data()));
  } else {
    return wrong("the numbers must be float32, bfloat16 or float16");
  }
  return ffi::Error::Success();
}

int64_t chosen(const ffi::Buffer<ffi::S32>& layer, int64_t layers) {
  return std::clamp<int64_t>(*layer.typed_data(), 0, layers - 1);
}

// x [R, C], w [layers, C, O], layer [] -> [R, O]
ffi::Error dense(ffi::ThreadPool pool, Floats x, ffi::AnyBuffer w, ffi::Buffer<ffi::S32> layer,
                 ffi::Result<Floats> out) {
  const auto shape = w.dimensions();
  const int64_t rows = x.dimensions()[0], inputs = shape[1], outputs = shape[2];
  return with_floats(w, [&](const auto* weights) {
    weights += chosen(layer, shape[0]) * inputs * outputs;
    const int64_t bytes = inputs * outputs * sizeof *weights;
    multiply_tiles(pool, rows, inputs, outputs, bytes, out->typed_data(),
                   [&](int64_t row, int64_t count, auto... range) {
                     dense_tile(x.typed_data() + row * inputs, count, inputs, weights, outputs, range...);
                   });
  });
}

template <class Code, class Scale>
void multiply_integers(ffi::ThreadPool& pool, const Floats& x, const Matrix<Code, Scale>& m, float* out) {
  using Q = std::conditional_t<std::is_same_v<Code, int8_t>, int16_t, int8_t>;
  const int64_t rows = x.dimensions()[0], inputs = x.dimensions()[1];
  // A segment is within one block.
  const int64_t most = Activations<Q>::kSegment, segment = m.in_blocks ? std::gcd(m.block, most) : most;
  static thread_local Activations<Q> rounded;
  rounded.round(x.typed_data(), rows, inputs, segment);
  const Activations<Q>& activations = rounded;  // that of this thread, also within the threads of the pool
  const int64_t bytes = inputs * m.outputs / (sizeof(Q) == 2 ? 1 : 2);
  multiply_tiles(pool, rows, activations.segments, m.outputs, bytes, out,
                 [&](int64_t row, int64_t count, auto... range) {
                   integer_tile(activations, row, count, inputs, m, range...);
                 });
}

// x [R, C], codes [layers, K, G, O] of int8 or int4, scale [layers, G, O] or [layers, 1, O] of float32 or
// bfloat16, layer [] -> [R, O]
ffi::Error integers(ffi::ThreadPool pool, Floats x, ffi::AnyBuffer codes, ffi::AnyBuffer scale,
                    ffi::Buffer<ffi::S32> layer, ffi::Result<Floats> out) {
  const auto shape = codes.dimensions();
  const int64_t number = chosen(layer, shape[0]), scales = scale.dimensions()[1], outputs = shape[3];
  const int64_t start = number * shape[1] * shape[2] * outputs;
  const bool in_blocks = scales == shape[2];
  if (in_blocks && shape[1] % 4) return wrong("a block must be a multiple of 4");
  if (start % 2) return wrong("a layer must begin at a byte");
  const auto multiply = [&](const auto* all, const auto* all_scales) {
    using Code = std::remove_const_t<std::remove_pointer_t<decltype(all)>>;
    using Scale = std::remove_const_t<std::remove_pointer_t<decltype(all_scales)>>;
    const auto* first = reinterpret_cast<const Code*>(address(all, start));
    const Scale* of_layer = all_scales + number * scales * outputs;
    const Matrix<Code, Scale> m{first, of_layer, shape[1], shape[2], outputs, in_blocks};
    multiply_integers(pool, x, m, out->typed_data());
  };
  const auto with_scales = [&](const auto* all) {
    if (scale.element_type() == ffi::F32) multiply(all, static_cast<const float*>(scale.untyped_data()));
    if (scale.element_type() == ffi::BF16) multiply(all, static_cast<const BF16*>(scale.untyped_data()));
  };
  if (codes.element_type() == ffi::S8) with_scales(static_cast<const int8_t*>(codes.untyped_data()));
  if (codes.element_type() == ffi::S4) with_scales(static_cast<const Nibble*>(codes.untyped_data()));
  return ffi::Error::Success();
}

// x [R, D], table [V, D] -> [R, V]
ffi::Error dense_table(ffi::ThreadPool pool, Floats x, ffi::AnyBuffer table, ffi::Result<Floats> out) {
  const int64_t rows = x.dimensions()[0], size = x.dimensions()[1], count = table.dimensions()[0];
  return with_floats(table, [&](const auto* numbers) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(numbers)>>;
    std::vector<float> ordered(x.typed_data(), x.typed_data() + rows * size);
    for (int64_t r = 0; r < rows && std::is_same_v<T, BF16>; ++r) {
      for (int64_t d = 0; d < size / 16 * 16; ++d) {
        const int64_t in_group = d % 8 * 2 + d / 8 % 2;
        ordered[r * size + d] = x.typed_data()[r * size + d / 16 * 16 + in_group];
      }
    }
    multiply_table(pool, DenseTable<T>{x.typed_data(), ordered.data(), numbers, size}, rows, count,
                   out->typed_data());
  });
}

// x [R, D], codes [V, D] of int8, scale [V, 1] -> [R, V]
ffi::Error integer_table(ffi::ThreadPool pool, Floats x, ffi::Buffer<ffi::S8> codes, Floats scale,
                         ffi::Result<Floats> out) {
  const int64_t rows = x.dimensions()[0], size = x.dimensions()[1];
  Activations<int16_t> rounded;
  rounded.round(x.typed_data(), rows, size, kTableSegment);
  const IntegerTable table{rounded, codes.typed_data(), scale.typed_data(), size};
  multiply_table(pool, table, rows, codes.dimensions()[0], out->typed_data());
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(gemma_dense, dense,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(gemma_integers, integers,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(gemma_dense_table, dense_table,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(gemma_integer_table, integer_table,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<Floats>()
                                  .Ret<Floats>());
