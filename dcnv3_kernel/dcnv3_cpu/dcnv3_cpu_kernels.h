// The arithmetic of DCNv3 on CPUs, written once and compiled for several instruction sets: the including file defines
//   DCNV3_ISA            the name of the set and of the namespace
//   DCNV3_VECTOR_BYTES   the width of its vector registers
//   DCNV3_F16C           whether it converts float16 in hardware
// and chooses the set (`#pragma GCC target`) after the standard headers and before this one. Nothing of the standard library
// is instantiated here, so no function that the linker may share is compiled for a set that the machine may lack.
//
// A unit of work is one group of one output pixel: 4 * P short rows of the input, D channels each, times a weight each. All
// that does not depend on the channel (location, bilinear weights, softmax) is computed once, vectorised over the points;
// the sums are vectorised over the channels. The four pixels that a point samples are always two neighbours in two rows that
// exist: at the image's border some of their weights are zero. As 0 * inf is not 0, a unit that is not finite is computed
// again, by branches. What is computed of a unit depends on the unit alone, not on the block or the thread it falls to.

namespace dcnv3 {
namespace DCNV3_ISA {
namespace {

// Keeps the compiler from loading a value twice, once for each use.
#if DCNV3_VECTOR_BYTES == 64
#define DCNV3_IN_REGISTER(value) __asm__("" : "+v"(value))
#elif defined(__x86_64__)
#define DCNV3_IN_REGISTER(value) __asm__("" : "+x"(value))
#else
#define DCNV3_IN_REGISTER(value)
#endif

#define DCNV3_INLINE inline __attribute__((always_inline))

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class T, int B>
struct VectorOf {
  typedef T type __attribute__((vector_size(sizeof(T) * B)));
  typedef T unaligned __attribute__((vector_size(sizeof(T) * B), aligned(alignof(T)), may_alias));
};
template <class T, int B>
using Vector = typename VectorOf<T, B>::type;

// Full registers, and the comparison results and 32-bit integers that go with them.
template <class T>
constexpr int lanes = DCNV3_VECTOR_BYTES / sizeof(T);
template <class T>
using Register = Vector<T, lanes<T>>;
template <class T>
struct MaskOf {
  typedef int32_t type;
};
template <>
struct MaskOf<double> {
  typedef int64_t type;
};
template <class T>
using MaskRegister = Vector<typename MaskOf<T>::type, lanes<T>>;

// Elements of `a` followed by `b`, by their numbers.
template <class V, class M>
DCNV3_INLINE V shuffle(V a, V b, M numbers) {
#if defined(__clang__)
  V result;
  constexpr int n = sizeof(V) / sizeof(a[0]);
  for (int i = 0; i < n; ++i) result[i] = numbers[i] < n ? a[numbers[i]] : b[numbers[i] - n];
  return result;
#else
  return __builtin_shuffle(a, b, numbers);
#endif
}

// ------------------------------------------------------------------------------------------------- 16-bit conversions

DCNV3_INLINE float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }
DCNV3_INLINE uint32_t bits_of(float value) { return __builtin_bit_cast(uint32_t, value); }

DCNV3_INLINE float widen(float value) { return value; }
DCNV3_INLINE double widen(double value) { return value; }
DCNV3_INLINE float widen(BFloat16 value) { return float_of(uint32_t(value.bits) << 16); }
DCNV3_INLINE float widen(Half value) {
  const uint32_t magnitude = value.bits & 0x7fffu, sign = uint32_t(value.bits & 0x8000u) << 16;
  uint32_t bits = bits_of(float_of(magnitude << 13) * 0x1p112f);  // moves the exponent; exact for subnormals too
  bits |= magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  return float_of(bits | sign);
}

DCNV3_INLINE void narrow(float value, float* to) { *to = value; }
DCNV3_INLINE void narrow(double value, double* to) { *to = value; }
DCNV3_INLINE void narrow(float value, BFloat16* to) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to->bits = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
DCNV3_INLINE void narrow(float value, Half* to) {
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;  // the addition rounds to 2^-24
  uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x477ff000u ? 0x7c00u : result;
  result = magnitude > 0x7f800000u ? 0x7e00u : result;
  to->bits = uint16_t(result | ((bits >> 16) & 0x8000u));
}

// ------------------------------------------------------------------------------------------------------- loads, stores

template <class T, int B>
DCNV3_INLINE Vector<T, B> load(const T* from) {
  return *reinterpret_cast<const typename VectorOf<T, B>::unaligned*>(from);
}

template <class T, int B>
DCNV3_INLINE Vector<T, B> load(const BFloat16* from) {
  typedef typename VectorOf<uint16_t, B>::unaligned Bits;
  const auto wide = __builtin_convertvector(*reinterpret_cast<const Bits*>(from), Vector<uint32_t, B>) << 16;
  return reinterpret_cast<Vector<float, B>>(wide);
}

template <class T, int B>
DCNV3_INLINE Vector<T, B> load(const Half* from) {
#if DCNV3_F16C
#if DCNV3_VECTOR_BYTES == 64
  if constexpr (B == 16) {
    return reinterpret_cast<Vector<float, 16>>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
  }
#endif
  if constexpr (B == 8) {
    return reinterpret_cast<Vector<float, 8>>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  }
  if constexpr (B >= 16) {
    union {
      Vector<float, B / 2> halves[2];
      Vector<float, B> whole;
    } both;
    both.halves[0] = load<T, B / 2>(from);
    both.halves[1] = load<T, B / 2>(from + B / 2);
    return both.whole;
  }
#endif
  Vector<float, B> result;
  for (int i = 0; i < B; ++i) result[i] = widen(from[i]);
  return result;
}

template <class T, int B>
DCNV3_INLINE void store(T* to, Vector<T, B> value) {
  *reinterpret_cast<typename VectorOf<T, B>::unaligned*>(to) = value;
}

template <class T>
DCNV3_INLINE void narrow_row(const T* __restrict from, T* __restrict to, int64_t n) {
  if (from != to) __builtin_memcpy(to, from, n * sizeof(T));
}
DCNV3_INLINE void narrow_row(const float* __restrict from, BFloat16* __restrict to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) narrow(from[i], to + i);
}
DCNV3_INLINE void narrow_row(const float* __restrict from, Half* __restrict to, int64_t n) {
  int64_t i = 0;
#if DCNV3_F16C
  for (; i + 8 <= n; i += 8) {
    const __m128i bits = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), bits);
  }
#endif
  for (; i < n; ++i) narrow(from[i], to + i);
}

template <class T, class S>
DCNV3_INLINE void widen_row(const S* __restrict from, T* __restrict to, int64_t n) {
  constexpr int L = lanes<T>;
  int64_t i = 0;
  for (; i + L <= n; i += L) store<T, L>(to + i, load<T, L>(from + i));
  for (; i < n; ++i) to[i] = widen(from[i]);
}

// ---------------------------------------------------------------------------------------------------- vector functions

// True if any element of a comparison's result is set.
template <class M>
DCNV3_INLINE bool any(M flags) {
#if DCNV3_VECTOR_BYTES == 64
  if constexpr (sizeof(M) == 64) {
    const __m512i bits = reinterpret_cast<__m512i>(flags);
    return _mm512_test_epi32_mask(bits, bits) != 0;
  }
#endif
#if DCNV3_VECTOR_BYTES >= 32
  if constexpr (sizeof(M) == 32) {
    const __m256i bits = reinterpret_cast<__m256i>(flags);
    return !_mm256_testz_si256(bits, bits);
  }
#endif
  constexpr int n = sizeof(M) / sizeof(flags[0]);
  decltype(flags[0] | flags[0]) all = flags[0];
  for (int i = 1; i < n; ++i) all |= flags[i];
  return all != 0;
}

// `a < b ? a : b` and `a > b ? a : b` (b where one of the two is NaN), and the next integer below, of full registers.
#if DCNV3_VECTOR_BYTES == 64
DCNV3_INLINE Register<float> least(Register<float> a, Register<float> b) { return _mm512_min_ps(a, b); }
DCNV3_INLINE Register<double> least(Register<double> a, Register<double> b) { return _mm512_min_pd(a, b); }
DCNV3_INLINE Register<float> greatest(Register<float> a, Register<float> b) { return _mm512_max_ps(a, b); }
DCNV3_INLINE Register<double> greatest(Register<double> a, Register<double> b) { return _mm512_max_pd(a, b); }
DCNV3_INLINE Register<float> round_down(Register<float> v) { return _mm512_roundscale_ps(v, _MM_FROUND_FLOOR); }
DCNV3_INLINE Register<double> round_down(Register<double> v) { return _mm512_roundscale_pd(v, _MM_FROUND_FLOOR); }
#elif DCNV3_VECTOR_BYTES == 32
DCNV3_INLINE Register<float> least(Register<float> a, Register<float> b) { return _mm256_min_ps(a, b); }
DCNV3_INLINE Register<double> least(Register<double> a, Register<double> b) { return _mm256_min_pd(a, b); }
DCNV3_INLINE Register<float> greatest(Register<float> a, Register<float> b) { return _mm256_max_ps(a, b); }
DCNV3_INLINE Register<double> greatest(Register<double> a, Register<double> b) { return _mm256_max_pd(a, b); }
DCNV3_INLINE Register<float> round_down(Register<float> v) { return _mm256_floor_ps(v); }
DCNV3_INLINE Register<double> round_down(Register<double> v) { return _mm256_floor_pd(v); }
#else
template <class V>
DCNV3_INLINE V least(V a, V b) {
  return a < b ? a : b;
}
template <class V>
DCNV3_INLINE V greatest(V a, V b) {
  return a > b ? a : b;
}
template <class V>  // of what int32_t can hold
DCNV3_INLINE V round_down(V v) {
  typedef Vector<int32_t, sizeof(V) / sizeof(v[0])> Int;
  const V truncated = __builtin_convertvector(__builtin_convertvector(v, Int), V);
  return truncated > v ? truncated - 1 : truncated;
}
#endif

template <class T>
DCNV3_INLINE bool is_finite(T value) {
  return value - value == T(0);
}

// Whether all of n values (and of what follows to a full register) are finite.
template <class T>
DCNV3_INLINE bool all_finite(const T* values, int64_t n) {
  constexpr int L = lanes<T>;
  Register<T> check = {};
  for (int64_t i = 0; i < n; i += L) {
    const Register<T> v = load<T, L>(values + i);
    check += v - v;
  }
  return !any(check != check);
}

// ---------------------------------------------------------------------------------------------------------- channels

// Sums over the points run over the channels in vectors of 32 bytes, with AVX-512 too: wider ones would have to be folded for
// the dot products of the backward pass, and made the forward pass 3 % faster on a Zen 4.
template <class T>
constexpr int channel_lanes = (DCNV3_VECTOR_BYTES < 32 ? DCNV3_VECTOR_BYTES : 32) / sizeof(T);

template <bool>
struct EnableIf {};
template <>
struct EnableIf<true> {
  typedef void type;
};

// B channels of a row of elements S as vectors of T, in an order of their own, which all of T's rows of that B share.
template <class T, class S, int B, class = void>
struct Piece {
  static constexpr int width = B < channel_lanes<T> ? B : channel_lanes<T>, count = B / width;
  typedef Vector<T, width> V;
  static DCNV3_INLINE void read(const S* from, V (&to)[count]) {
    for (int c = 0; c < count; ++c) to[c] = load<T, width>(from + c * width);
  }
  static DCNV3_INLINE void write(const V (&from)[count], S* to) {
    if constexpr (sizeof(S) == sizeof(T)) {
      for (int c = 0; c < count; ++c) store<T, width>(to + c * width, from[c]);
    } else {
      T row[B];
      for (int c = 0; c < count; ++c) store<T, width>(row + c * width, from[c]);
      narrow_row(row, to, B);
    }
  }
};

// Two bfloat16 to a 32-bit element: those of even number are its lower half, the others its upper half. No element has to
// change its place.
template <class V>
DCNV3_INLINE auto rounded_to_bfloat16(V value) {  // the result is in the upper half
  typedef Vector<uint32_t, sizeof(V) / 4> U;
  const U bits = reinterpret_cast<U>(value), none = {};
  const U rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return value == value ? rounded : none + 0x7fc00000u;
}
template <class V>
DCNV3_INLINE auto pairs_of_bfloat16(V even, V odd) {
  return (rounded_to_bfloat16(even) >> 16) | (rounded_to_bfloat16(odd) & 0xffff0000u);
}
template <class T, int B>
struct Piece<T, BFloat16, B, typename EnableIf<(B >= 8)>::type> {
  static constexpr int width = B / 2 < channel_lanes<T> ? B / 2 : channel_lanes<T>, count = B / width;
  typedef Vector<T, width> V;
  typedef typename VectorOf<uint32_t, width>::unaligned Pairs;
  static DCNV3_INLINE void read(const BFloat16* from, V (&to)[count]) {
    for (int c = 0; c < count; c += 2) {
      Vector<uint32_t, width> pairs = *reinterpret_cast<const Pairs*>(from + c * width);
      DCNV3_IN_REGISTER(pairs);
      to[c] = reinterpret_cast<V>(pairs << 16);
      to[c + 1] = reinterpret_cast<V>(pairs & 0xffff0000u);
    }
  }
  static DCNV3_INLINE void write(const V (&from)[count], BFloat16* to) {
    for (int c = 0; c < count; c += 2) {
      *reinterpret_cast<Pairs*>(to + c * width) = pairs_of_bfloat16(from[c], from[c + 1]);
    }
  }
};

// Calls `function.template operator()<B>(c)` for pieces of B channels from channel c on: one of D channels, or several.
template <int D, class F>
DCNV3_INLINE void for_pieces(int64_t channels, F&& function) {
  if constexpr (D != 0) {
    function.template operator()<D>(0);
  } else {
    int64_t c = 0;
    for (; c + 16 <= channels; c += 16) function.template operator()<16>(c);
    for (; c + 4 <= channels; c += 4) function.template operator()<4>(c);
    for (; c < channels; ++c) function.template operator()<1>(c);
  }
}

// ------------------------------------------------------------------------------------------------------------- softmax

// exp(x) for x <= 16, to about one unit in the last place; 0 below the normal range, NaN for NaN.
template <class T>
DCNV3_INLINE Register<T> exponential(Register<T> x) {
  constexpr bool is_double = sizeof(T) == 8;
  typedef Register<T> V;
  typedef MaskRegister<T> M;
  const V zero = {};
  const T magic = is_double ? T(6755399441055744.0) : T(12582912.0);  // 1.5 * 2^52, 1.5 * 2^23
  const T lowest = is_double ? T(-708) : T(-87);
  const V clamped = x > lowest ? x : zero + lowest;
  const V shifted = clamped * T(1.4426950408889634) + magic;
  const V k = shifted - magic;
  const T high = is_double ? T(0.693147180369123816490) : T(0.693359375);
  const T low = is_double ? T(1.90821492927058770002e-10) : T(-2.12194440e-4);
  const V r = (clamped - k * high) - k * low;
  V p = zero;
  if constexpr (is_double) {
    p = p + T(1.6059043836821613e-10);  // 1 / 13!
    p = p * r + T(2.08767569878681e-09);
    p = p * r + T(2.505210838544172e-08);
    p = p * r + T(2.755731922398589e-07);
    p = p * r + T(2.7557319223985893e-06);
    p = p * r + T(2.48015873015873e-05);
    p = p * r + T(0.0001984126984126984);
  } else {
    p = p + T(0.0001984126984126984);  // 1 / 7!
  }
  p = p * r + T(0.001388888888888889);
  p = p * r + T(0.008333333333333333);
  p = p * r + T(0.041666666666666664);
  p = p * r + T(0.16666666666666666);
  p = p * r + T(0.5);
  p = p * r + T(1);
  p = p * r + T(1);
  const M exponent = reinterpret_cast<M>(shifted) << (is_double ? 52 : 23);  // k in the low bits of `shifted`
  V result = p * reinterpret_cast<V>(exponent + reinterpret_cast<M>(zero + T(1)));
  result = x < lowest ? zero : result;
  return x == x ? result : x;
}

// Softmax over each `points` consecutive values, in place. Memory to the next multiple of a register is overwritten. With
// `inverse`, what remains to be done is written there instead: the factor of each group. A group's result depends on nothing
// but the group.
template <class T, int P>
DCNV3_INLINE void softmax(T* values, int64_t count, int64_t dynamic_points, T* inverse = nullptr) {
  constexpr int L = lanes<T>;
  typedef Register<T> V;
  const int64_t points = P ? P : dynamic_points;
  const int64_t n = count * points;
  const T limit = 16;  // exponentials of less need no maximum: they and their sums are far from the range's ends
  for (int64_t i = n; i < (n + L - 1) / L * L; ++i) values[i] = 0;
  V largest = {};
  for (int64_t i = 0; i < n; i += L) {
    const V v = load<T, L>(values + i);
    largest = greatest(greatest(v, -v), largest);
    largest = v == v ? largest : v;
  }
  if (__builtin_expect(any(~(largest < limit)), 0)) {
    for (int64_t g = 0; g < count; ++g) {
      T* group = values + g * points;
      T maximum = group[0];
      bool small = true;
      for (int64_t i = 0; i < points; ++i) {
        maximum = group[i] > maximum ? group[i] : maximum;
        small &= group[i] < limit && group[i] > -limit;
      }
      for (int64_t i = 0; i < points && !small; ++i) group[i] -= maximum;
    }
  }
  for (int64_t i = 0; i < n; i += L) store<T, L>(values + i, exponential<T>(load<T, L>(values + i)));
  for (int64_t g = 0; g < count; ++g) {
    T* group = values + g * points;
    T sum = 0;
#pragma GCC unroll 9
    for (int64_t i = 0; i < points; ++i) sum += group[i];
    const T factor = T(1) / sum;
    if (inverse != nullptr) {
      inverse[g] = factor;
    } else {
      for (int64_t i = 0; i < points; ++i) group[i] *= factor;
    }
  }
}

// ----------------------------------------------------------------------------------------------------------- locations

// What the points of a block need, structures of arrays. `capacity` points each, and some room for full registers.
template <class T>
struct Points {
  T *x, *y, *mask;         // positions, and the (normalised) modulation
  int32_t* index;          // of the upper left one of the four pixels that a point samples
  T* weight[4];            // of the four pixels: upper left, upper right, lower left, lower right; includes the modulation
  T *from_x, *from_y;      // position relative to the upper left pixel, -1 or 2 at most
  T *kernel_x, *kernel_y;  // the regular grid around its centre, dilated and scaled, repeated for every group
  T* factor;               // of each group's softmax
  T *by_mask, *by_offset;  // gradients: (capacity), (capacity, 2)
  T* dots;                 // of the four pixels with the output's gradient, (capacity, 4)

  static int64_t round_up(int64_t n) { return (n + 15) / 16 * 16 + 16; }
  static size_t bytes(int64_t capacity) { return round_up(capacity) * (20 * sizeof(T) + 4); }

  Points(char* memory, int64_t capacity) {
    const int64_t n = round_up(capacity);
    T* values = reinterpret_cast<T*>(memory);
    const auto take = [&](int64_t size) {
      T* taken = values;
      values += size;
      return taken;
    };
    x = take(n), y = take(n), mask = take(n), kernel_x = take(n), kernel_y = take(n), factor = take(n);
    for (int k = 0; k < 4; ++k) weight[k] = take(n);
    from_x = take(n), from_y = take(n), by_mask = take(n), by_offset = take(2 * n), dots = take(4 * n);
    index = reinterpret_cast<int32_t*>(values);
    for (int64_t i = 0; i < n; ++i) kernel_x[i] = kernel_y[i] = 0;
  }

  void set_kernel(const Shape& s, int64_t repeats) {
    const T scale = T(s.offset_scale);
    const int64_t half_w = s.dilation_w * (s.kernel_w - 1) / 2, half_h = s.dilation_h * (s.kernel_h - 1) / 2;
    int64_t i = 0;
    for (int64_t r = 0; r < repeats; ++r) {
      for (int64_t column = 0; column < s.kernel_w; ++column) {
        for (int64_t row = 0; row < s.kernel_h; ++row) {
          if (s.remove_center && column == s.kernel_w / 2 && row == s.kernel_h / 2) continue;
          kernel_x[i] = T(column * s.dilation_w - half_w) * scale;
          kernel_y[i] = T(row * s.dilation_h - half_h) * scale;
          ++i;
        }
      }
    }
  }
};

// Where the kernel's centre lies along one axis, exactly: `start + out * stride`.
template <class T>
struct Origin {
  T start, stride;
  Origin(int64_t step, int64_t padding, int64_t dilation, int64_t kernel)
      : start(T(dilation * (kernel - 1) / 2 - padding)), stride(T(step)) {}
  T operator()(int64_t out) const { return T(out) * stride + start; }
};

// The 2 * lanes offsets at `from`, as those along x and those along y.
template <class T, class S>
DCNV3_INLINE void read_offsets(const S* from, Register<T>& x, Register<T>& y) {
  constexpr int L = lanes<T>;
  if constexpr (__is_same(S, BFloat16)) {
    const Vector<uint32_t, L> pairs = *reinterpret_cast<const typename VectorOf<uint32_t, L>::unaligned*>(from);
    x = reinterpret_cast<Register<T>>(pairs << 16), y = reinterpret_cast<Register<T>>(pairs & 0xffff0000u);
  } else {
    MaskRegister<T> even, odd;
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) even[i] = 2 * i, odd[i] = 2 * i + 1;
    const Register<T> first = load<T, L>(from), second = load<T, L>(from + L);
    x = shuffle(first, second, even), y = shuffle(first, second, odd);
  }
}

// A run of output pixels of one image and some of its groups: what is computed at once for all their points.
struct Block {
  int64_t pixel, count;   // of all output pixels, of all images
  int64_t x, y;           // of the first pixel
  int64_t group, groups;  // the first group and their number
};

// Reads a block's offsets and modulations: fills positions and `mask`.
template <class T, class S, int P>
DCNV3_INLINE void place(
    const Points<T>& p, const Shape& s, const Block& block, const S* offsets, const S* masks, const Origin<T>& origins_x,
    const Origin<T>& origins_y, T scale) {
  constexpr int L = lanes<T>;
  const int64_t points = P ? P : s.points, n = block.groups * points;
  const int64_t total = s.batch * s.height_out * s.width_out * s.groups * points;
  int64_t x_out = block.x, y_out = block.y;
  for (int64_t q = 0; q < block.count; ++q) {
    const T origin_x = origins_x(x_out), origin_y = origins_y(y_out);
    if (++x_out == s.width_out) x_out = 0, ++y_out;
    const int64_t first = ((block.pixel + q) * s.groups + block.group) * points, at = q * n;
    for (int64_t i = 0; i < n; i += L) {
      const S *offset = offsets + 2 * (first + i), *mask = masks + first + i;
      S offset_end[2 * L], mask_end[L];
      if (__builtin_expect(first + i + L > total, 0)) {  // nothing behind the tensors' end is read
        const int64_t rest = total - first - i;
        __builtin_memset(offset_end, 0, sizeof(offset_end));
        __builtin_memset(mask_end, 0, sizeof(mask_end));
        __builtin_memcpy(offset_end, offset, 2 * rest * sizeof(S));
        __builtin_memcpy(mask_end, mask, rest * sizeof(S));
        offset = offset_end, mask = mask_end;
      }
      Register<T> x, y;
      read_offsets<T>(offset, x, y);
      store<T, L>(p.x + at + i, (load<T, L>(p.kernel_x + i) + origin_x) + x * scale);
      store<T, L>(p.y + at + i, (load<T, L>(p.kernel_y + i) + origin_y) + y * scale);
      store<T, L>(p.mask + at + i, load<T, L>(mask));
    }
  }
}

// An axis of the image, of which a point samples two neighbours: `base` and the next one. They are chosen such that both
// exist (unless there is but one), the weights accordingly: of a point between -1 and 0, `base` is 0 and the next one gets 0.
template <class T>
struct Axis {
  T end, last, reach;
  explicit Axis(int64_t size) : end(T(size)), last(size > 2 ? T(size - 2) : T(0)), reach(size > 1 ? 2 : 0) {}
  // The base of positions, and the positions relative to it, such that what is not inside (-1, size) gets two weights of 0.
  DCNV3_INLINE Register<T> base(Register<T> position, Register<T>& relative) const {
    const Register<T> zero = {};
    const Register<T> clamped = greatest(least(position, zero + end), zero - T(1));  // NaN becomes `end`
    const Register<T> low = least(greatest(round_down(clamped), zero), zero + last);
    relative = clamped - low;
    return low;
  }
  DCNV3_INLINE void weights(Register<T> relative, Register<T>& first, Register<T>& second) const {
    const Register<T> zero = {};
    first = greatest(T(1) - greatest(relative, -relative), zero);
    second = greatest(least(relative, reach - relative), zero);
  }
  // Derivatives of the weights by the position.
  DCNV3_INLINE void slopes(Register<T> relative, Register<T>& first, Register<T>& second) const {
    const Register<T> zero = {}, one = zero + T(1);
    first = relative < one ? (relative < zero ? (relative > -one ? one : zero) : -one) : zero;
    second = relative < one ? one : -one;
    second = ((relative >= zero) & (relative < zero + reach)) ? second : zero;
  }
};

// Fills indices and weights of n points (and what follows to a full register) from their positions. What is not strictly
// inside (-1, size), NaN included, gets the weight 0. Backward, fills `from_x` and `from_y` too, and widens the range of rows
// [*low, *high] to the upper one of the rows that are sampled.
template <bool Backward, class T>
DCNV3_INLINE void locate(
    const Points<T>& p, int64_t n, const Axis<T>& columns, const Axis<T>& rows, int64_t width,
    int64_t* low = nullptr, int64_t* high = nullptr) {
  constexpr int L = lanes<T>;
  typedef Register<T> V;
  typedef Vector<int32_t, L> Int;
  V lowest = V{} + rows.end, highest = {};
  for (int64_t i = 0; i < n; i += L) {
    V from_x, from_y, left, right, top, bottom;
    const V x = columns.base(load<T, L>(p.x + i), from_x), y = rows.base(load<T, L>(p.y + i), from_y);
    columns.weights(from_x, left, right);
    rows.weights(from_y, top, bottom);
    store<int32_t, L>(p.index + i, __builtin_convertvector(y, Int) * int32_t(width) + __builtin_convertvector(x, Int));
    const V mask = load<T, L>(p.mask + i);  // one that is not finite shows in the weights, also where they are 0
    top *= mask, bottom *= mask;
    store<T, L>(p.weight[0] + i, top * left);
    store<T, L>(p.weight[1] + i, top * right);
    store<T, L>(p.weight[2] + i, bottom * left);
    store<T, L>(p.weight[3] + i, bottom * right);
    if (Backward) {
      store<T, L>(p.from_x + i, from_x);
      store<T, L>(p.from_y + i, from_y);
      lowest = least(y, lowest), highest = greatest(y, highest);
    }
  }
  if (Backward) {
    for (int i = 0; i < L; ++i) {
      *low = int64_t(lowest[i]) < *low ? int64_t(lowest[i]) : *low;
      *high = int64_t(highest[i]) > *high ? int64_t(highest[i]) : *high;
    }
  }
}

// One point exactly, where what is multiplied by 0 may be infinite: which of the four pixels around it are in the image.
template <class T>
struct Corners {
  bool within;  // the point counts: at least one is
  bool inside[4];
  int64_t index[4];  // of the pixel
  T weight[4];       // bilinear
  int order[4];      // the pixel's number among those that `locate` chose

  Corners(T x, T y, int64_t height, int64_t width) {
    within = x > T(-1) && x < T(width) && y > T(-1) && y < T(height);
    const T px = within ? x : 0, py = within ? y : 0;
    int64_t x0 = int64_t(px), y0 = int64_t(py);
    x0 -= px < T(x0), y0 -= py < T(y0);
    const T fx = px - T(x0), fy = py - T(y0);
    const int64_t last_x = width > 2 ? width - 2 : 0, last_y = height > 2 ? height - 2 : 0;
    const int64_t base_x = x0 < 0 ? 0 : x0 < last_x ? x0 : last_x, base_y = y0 < 0 ? 0 : y0 < last_y ? y0 : last_y;
    for (int k = 0; k < 4; ++k) {
      const int64_t column = x0 + k % 2, row = y0 + k / 2;
      inside[k] = within && column >= 0 && column < width && row >= 0 && row < height;
      index[k] = row * width + column;
      weight[k] = (k % 2 ? fx : 1 - fx) * (k / 2 ? fy : 1 - fy);
      order[k] = int(column - base_x + 2 * (row - base_y));
    }
  }
};

// ------------------------------------------------------------------------------------------------------------- forward

constexpr int64_t points_per_block = 144;  // whole registers for 9 points of 16 groups; all arrays stay in the first cache

// B channels of one group of one output pixel. Returns 0 in every element if all are finite, else NaN in some.
template <class T, class S, int P, int B>
DCNV3_INLINE typename Piece<T, S, B>::V gather(
    const Points<T>& p, int64_t at, int64_t dynamic_points, T factor, int64_t pixel_stride, const S* base, int64_t right,
    int64_t down, S* to) {
  typedef Piece<T, S, B> Channels;
  typedef typename Channels::V V;
  constexpr int N = Channels::count, A = N >= 4 ? 2 : 4;  // sums that do not wait for each other
  const int64_t points = P ? P : dynamic_points;
  const S* const corners[4] = {base, base + right, base + down, base + down + right};
  V sum[A][N] = {};
#pragma GCC unroll 9
  for (int64_t i = at; i < at + points; ++i) {
    const int64_t index = p.index[i] * pixel_stride;
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      V row[N];
      Channels::read(corners[k] + index, row);
      const T weight = p.weight[k][i];
      for (int c = 0; c < N; ++c) sum[k % A][c] += weight * row[c];
    }
  }
  V check = {};
  for (int c = 0; c < N; ++c) {
    if (A == 4) sum[0][c] = (sum[0][c] + sum[1 % A][c]) + (sum[2 % A][c] + sum[3 % A][c]);
    if (A == 2) sum[0][c] += sum[1 % A][c];
    sum[0][c] *= factor;
    check += sum[0][c] - sum[0][c];
  }
  Channels::write(sum[0], to);
  return check;
}

// One group of one output pixel by branches: pixels outside the image are not touched.
template <class T, class S>
__attribute__((noinline)) void gather_exactly(
    const Points<T>& p, int64_t at, const Shape& s, int64_t channels, T factor, const S* base, S* to) {
  for (int64_t c = 0; c < channels; ++c) {
    T total = 0;
    for (int64_t i = at; i < at + s.points; ++i) {
      const Corners<T> corners(p.x[i], p.y[i], s.height, s.width);
      for (int k = 0; k < 4; ++k) {
        if (!corners.inside[k]) continue;
        total += corners.weight[k] * (p.mask[i] * factor) * T(widen(base[corners.index[k] * s.channels + c]));
      }
    }
    narrow(total, to + c);
  }
}

// Pixels and groups of a block, such that it has about as many points as it should.
inline int64_t pixels_of_block(const Shape& s, int64_t groups) {
  const int64_t fitting = points_per_block / (groups * s.points);
  return fitting < 1 ? 1 : fitting;
}
// Points of a block of so many groups or less.
inline int64_t block_capacity(const Shape& s, int64_t groups) {
  return groups * s.points > points_per_block ? groups * s.points : points_per_block;
}
inline int64_t groups_of_block(const Shape& s) {
  const int64_t fitting = points_per_block / s.points;
  return fitting < 1 ? 1 : fitting < s.groups ? fitting : s.groups;
}

template <class T, class S, int P, int D>
void forward_pixels(const ForwardArguments& a, int64_t begin, int64_t end, void* scratch) {
  const Shape& s = a.shape;
  const int64_t points = P ? P : s.points, channels = D ? D : s.group_channels;
  const int64_t groups_at_once = groups_of_block(s), pixels_at_once = pixels_of_block(s, groups_at_once);
  Points<T> p(static_cast<char*>(scratch), block_capacity(s, groups_at_once));
  p.set_kernel(s, groups_at_once);
  const T scale = T(s.offset_scale);
  const Origin<T> origins_x(s.stride_w, s.padding_w, s.dilation_w, s.kernel_w);
  const Origin<T> origins_y(s.stride_h, s.padding_h, s.dilation_h, s.kernel_h);
  const Axis<T> columns(s.width), rows(s.height);
  const int64_t right = s.width > 1 ? s.channels : 0, down = s.height > 1 ? s.width * s.channels : 0;
  const int64_t pixels = s.height_out * s.width_out;
  for (int64_t pixel = begin; pixel < end;) {
    const int64_t image = pixel / pixels, place_in_image = pixel % pixels;
    int64_t count = pixels - place_in_image < end - pixel ? pixels - place_in_image : end - pixel;
    if (count > pixels_at_once) count = pixels_at_once;
    const S* input = static_cast<const S*>(a.input) + image * s.height * s.width * s.channels;
    for (int64_t group = 0; group < s.groups; group += groups_at_once) {
      const int64_t groups = group + groups_at_once <= s.groups ? groups_at_once : s.groups - group;
      const Block block{pixel, count, place_in_image % s.width_out, place_in_image / s.width_out, group, groups};
      place<T, S, P>(
          p, s, block, static_cast<const S*>(a.offset), static_cast<const S*>(a.mask), origins_x, origins_y, scale);
      const int64_t units = count * groups;
      if (s.softmax) softmax<T, P>(p.mask, units, points, p.factor);
      locate<false>(p, units * points, columns, rows, s.width);
      const S* base = input + group * channels;
      S* output = static_cast<S*>(a.output) + pixel * s.channels + group * channels;
      bool finite = true;
      typename Piece<T, S, D ? D : 16>::V check = {};
      int64_t unit = 0;
      for (int64_t q = 0; q < count; ++q) {
        for (int64_t g = 0; g < groups; ++g, ++unit) {
          const T factor = s.softmax ? p.factor[unit] : T(1);
          S* to = output + q * s.channels + g * channels;
          for_pieces<D>(channels, [&]<int B>(int64_t c) __attribute__((always_inline)) {
            const S* from = base + g * channels + c;
            const auto bad = gather<T, S, P, B>(p, unit * points, points, factor, s.channels, from, right, down, to + c);
            if constexpr (sizeof(bad) == sizeof(check)) {
              check += bad;
            } else {
              finite &= !any(bad != bad);
            }
          });
        }
      }
      if (__builtin_expect(!finite || any(check != check), 0)) {
        for (unit = 0; unit < units; ++unit) {
          S* to = output + unit / groups * s.channels + unit % groups * channels;
          bool unit_is_finite = true;
          for (int64_t c = 0; c < channels; ++c) unit_is_finite &= is_finite(widen(to[c]));
          if (unit_is_finite) continue;
          const T factor = s.softmax ? p.factor[unit] : T(1);
          gather_exactly(p, unit * points, s, channels, factor, base + unit % groups * channels, to);
        }
      }
    }
    pixel += count;
  }
}

// ------------------------------------------------------------------------------------------------------------ backward

// The sums of four vectors, as one vector of four.
template <class T>
DCNV3_INLINE Vector<T, 4> four_sums(Vector<T, 8> a, Vector<T, 8> b, Vector<T, 8> c, Vector<T, 8> d) {
  typedef Vector<typename MaskOf<T>::type, 8> M;
  const M low = {0, 8, 1, 9, 4, 12, 5, 13}, high = {2, 10, 3, 11, 6, 14, 7, 15};
  const Vector<T, 8> ab = shuffle(a, b, low) + shuffle(a, b, high);
  const Vector<T, 8> cd = shuffle(c, d, low) + shuffle(c, d, high);
  union {
    Vector<T, 8> whole;
    Vector<T, 4> halves[2];
  } u;
  u.whole = shuffle(ab, cd, M{0, 1, 8, 9, 4, 5, 12, 13}) + shuffle(ab, cd, M{2, 3, 10, 11, 6, 7, 14, 15});
  return u.halves[0] + u.halves[1];
}
template <class T>
DCNV3_INLINE Vector<T, 4> four_sums(Vector<T, 4> a, Vector<T, 4> b, Vector<T, 4> c, Vector<T, 4> d) {
  typedef Vector<typename MaskOf<T>::type, 4> M;
  const M low = {0, 4, 1, 5}, high = {2, 6, 3, 7};
  const Vector<T, 4> ab = shuffle(a, b, low) + shuffle(a, b, high);
  const Vector<T, 4> cd = shuffle(c, d, low) + shuffle(c, d, high);
  return shuffle(ab, cd, M{0, 1, 4, 5}) + shuffle(ab, cd, M{2, 3, 6, 7});
}
template <class T>
DCNV3_INLINE Vector<T, 4> four_sums(Vector<T, 2> a, Vector<T, 2> b, Vector<T, 2> c, Vector<T, 2> d) {
  return Vector<T, 4>{a[0] + a[1], b[0] + b[1], c[0] + c[1], d[0] + d[1]};
}
template <class T>
DCNV3_INLINE Vector<T, 4> four_sums(Vector<T, 1> a, Vector<T, 1> b, Vector<T, 1> c, Vector<T, 1> d) {
  return Vector<T, 4>{a[0], b[0], c[0], d[0]};
}

// The dot products of the output's gradient with the four pixels of each point: one group of one output pixel, B channels.
template <class T, class S, int P, int B>
DCNV3_INLINE void multiply(
    const Points<T>& p, int64_t at, int64_t dynamic_points, int64_t pixel_stride, const S* gradient, const S* input,
    int64_t right, int64_t down, bool first) {
  typedef Piece<T, S, B> Channels;
  typedef typename Channels::V V;
  constexpr int N = Channels::count;
  const int64_t points = P ? P : dynamic_points;
  const S* const corners[4] = {input, input + right, input + down, input + down + right};
  V grad[N];
  Channels::read(gradient, grad);
#pragma GCC unroll 3
  for (int64_t i = at; i < at + points; ++i) {
    const int64_t index = p.index[i] * pixel_stride;
    V product[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      V row[N];
      Channels::read(corners[k] + index, row);
      product[k] = grad[0] * row[0];
      for (int c = 1; c < N; ++c) product[k] += grad[c] * row[c];
    }
    Vector<T, 4> dots = four_sums<T>(product[0], product[1], product[2], product[3]);
    if (!first) dots += load<T, 4>(p.dots + 4 * i);
    store<T, 4>(p.dots + 4 * i, dots);
  }
}

// Adds the output's gradient, weighted, to the sums of the four pixels of each point.
template <class T, class S, int P, int B>
DCNV3_INLINE void scatter(
    const Points<T>& p, int64_t at, int64_t dynamic_points, int64_t pixel_stride, const S* gradient, T* sums,
    int64_t right, int64_t down) {
  typedef Piece<T, S, B> Channels;
  typedef typename Channels::V V;
  constexpr int N = Channels::count, width = Channels::width;
  const int64_t points = P ? P : dynamic_points;
  T* const corners[4] = {sums, sums + right, sums + down, sums + down + right};
  V grad[N];
  Channels::read(gradient, grad);
#pragma GCC unroll 3
  for (int64_t i = at; i < at + points; ++i) {
    const int64_t index = p.index[i] * pixel_stride;
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const T weight = p.weight[k][i];
      T* to = corners[k] + index;
      for (int c = 0; c < N; ++c) store<T, width>(to + c * width, load<T, width>(to + c * width) + weight * grad[c]);
    }
  }
}

// Both, by branches: pixels outside the image are not touched. `sums` has the channels in the order of `scatter`.
template <class T, class S, int D>
__attribute__((noinline)) void scatter_exactly(
    const Points<T>& p, int64_t at, const Shape& s, int64_t channels, const S* gradient, const S* input, T* sums,
    int64_t pixel_stride) {
  for (int64_t i = at; i < at + s.points; ++i) {
    const Corners<T> corners(p.x[i], p.y[i], s.height, s.width);
    for (int k = 0; k < 4; ++k) p.dots[4 * i + k] = 0;
    for (int k = 0; k < 4; ++k) {
      if (!corners.inside[k]) continue;
      const T weight = corners.weight[k] * p.mask[i];
      T* to = sums + corners.index[k] * pixel_stride;
      for_pieces<D>(channels, [&]<int B>(int64_t c) {
        typedef Piece<T, S, B> Channels;
        typename Channels::V grad[Channels::count];
        Channels::read(gradient + c, grad);
        for (int j = 0; j < Channels::count; ++j) {
          T* sum = to + c + j * Channels::width;
          store<T, Channels::width>(sum, load<T, Channels::width>(sum) + weight * grad[j]);
        }
      });
      T dot = 0;
      for (int64_t c = 0; c < channels; ++c) {
        dot += T(widen(gradient[c])) * T(widen(input[corners.index[k] * s.channels + c]));
      }
      p.dots[4 * i + corners.order[k]] = dot;
    }
  }
}

// n gradients of offsets, x and y in turns, to `to`.
template <class T, class S>
DCNV3_INLINE void write_offsets(Register<T> x, Register<T> y, S* to) {
  constexpr int L = lanes<T>;
  if constexpr (__is_same(S, BFloat16)) {
    *reinterpret_cast<typename VectorOf<uint32_t, L>::unaligned*>(to) = pairs_of_bfloat16(x, y);
  } else {
    MaskRegister<T> in_turns;
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) in_turns[i] = i / 2 + i % 2 * L;
    T values[2 * L];
    store<T, L>(values, shuffle(x, y, in_turns));
    store<T, L>(values + L, shuffle(x, y, in_turns + L / 2));
    narrow_row(values, to, 2 * L);
  }
}

template <class S>
DCNV3_INLINE void copy_row(const S* from, S* to, int64_t n) {
  constexpr int L = 32 / sizeof(S);
  typedef typename VectorOf<uint8_t, 32>::unaligned Bytes;
  int64_t i = 0;
  for (; i + L <= n; i += L) *reinterpret_cast<Bytes*>(to + i) = *reinterpret_cast<const Bytes*>(from + i);
  for (; i < n; ++i) to[i] = from[i];
}

// Gradients of a block's offsets and modulations, from the dot products. finite: whether these and the modulations are.
template <class T, class S, int P>
DCNV3_INLINE void differentiate(
    const BackwardArguments& a, const Points<T>& p, const Block& block, const Axis<T>& columns, const Axis<T>& rows,
    bool finite) {
  constexpr int L = lanes<T>;
  typedef Register<T> V;
  typedef MaskRegister<T> M;
  const Shape& s = a.shape;
  const int64_t points = P ? P : s.points, units = block.count * block.groups, n = units * points;
  const T scale = T(s.offset_scale);
  S* const by_offset = reinterpret_cast<S*>(p.by_offset);
  M by_corner, halves;
#pragma GCC unroll 16
  for (int j = 0; j < L / 2; ++j) {
    by_corner[j] = 4 * j, by_corner[L / 2 + j] = 4 * j + 1;
    halves[j] = j, halves[L / 2 + j] = L + j;
  }
  for (int64_t i = 0; i < n; i += L) {
    V d[4], from[4];
    for (int k = 0; k < 4; ++k) from[k] = load<T, L>(p.dots + 4 * i + k * L);
    for (int k = 0; k < 4; k += 2) {  // from corners by points to points by corners
      const V one = shuffle(from[0], from[1], by_corner + k), other = shuffle(from[2], from[3], by_corner + k);
      d[k] = shuffle(one, other, halves);
      d[k + 1] = shuffle(one, other, halves + L / 2);
    }
    const V x = load<T, L>(p.from_x + i), y = load<T, L>(p.from_y + i), factor = load<T, L>(p.mask + i) * scale;
    V left, right, top, bottom, left_slope, right_slope, top_slope, bottom_slope;
    columns.weights(x, left, right);
    rows.weights(y, top, bottom);
    columns.slopes(x, left_slope, right_slope);
    rows.slopes(y, top_slope, bottom_slope);
    store<T, L>(p.by_mask + i, top * (left * d[0] + right * d[1]) + bottom * (left * d[2] + right * d[3]));
    const V by_x = top * (left_slope * d[0] + right_slope * d[1]) + bottom * (left_slope * d[2] + right_slope * d[3]);
    const V by_y = left * (top_slope * d[0] + bottom_slope * d[2]) + right * (top_slope * d[1] + bottom_slope * d[3]);
    write_offsets<T>(by_x * factor, by_y * factor, by_offset + 2 * i);
  }
  for (int64_t i = 0; !finite && i < n; ++i) {  // 0 * inf: a point that does not count has no gradient
    if (!Corners<T>(p.x[i], p.y[i], s.height, s.width).within) by_offset[2 * i] = by_offset[2 * i + 1] = S{};
  }
  for (int64_t unit = 0; s.softmax && unit < units; ++unit) {
    T* by_mask = p.by_mask + unit * points;
    const T* mask = p.mask + unit * points;
    T mean = 0;
#pragma GCC unroll 9
    for (int64_t i = 0; i < points; ++i) mean += mask[i] * by_mask[i];
#pragma GCC unroll 9
    for (int64_t i = 0; i < points; ++i) by_mask[i] = mask[i] * (by_mask[i] - mean);
  }
  const int64_t length = block.groups * points;
  for (int64_t q = 0; q < block.count; ++q) {
    const int64_t first = ((block.pixel + q) * s.groups + block.group) * points;
    copy_row(by_offset + 2 * q * length, static_cast<S*>(a.grad_offset) + 2 * first, 2 * length);
    narrow_row(p.by_mask + q * length, static_cast<S*>(a.grad_mask) + first, length);
  }
}

// Zeroes the rows [from, to) of (H, W, channels) sums.
template <class T>
DCNV3_INLINE void clear_rows(const Shape& s, T* sums, int64_t channels, int64_t from, int64_t to) {
  if (from < to) __builtin_memset(sums + from * s.width * channels, 0, (to - from) * s.width * channels * sizeof(T));
}

// The gradient of some groups of one image for the output rows [first_row, last_row). `sums` is (H, W, groups * D), zeroed for
// the rows [range[0], range[1]), which grow as needed.
template <class T, class S, int P, int D>
DCNV3_INLINE void backward_rows(
    const BackwardArguments& a, const Points<T>& p, int64_t image, int64_t group, int64_t groups, int64_t first_row,
    int64_t last_row, T* sums, int64_t* range) {
  const Shape& s = a.shape;
  const int64_t points = P ? P : s.points, channels = D ? D : s.group_channels;
  const T scale = T(s.offset_scale);
  const S* input = static_cast<const S*>(a.input) + image * s.height * s.width * s.channels + group * channels;
  const Origin<T> origins_x(s.stride_w, s.padding_w, s.dilation_w, s.kernel_w);
  const Origin<T> origins_y(s.stride_h, s.padding_h, s.dilation_h, s.kernel_h);
  const Axis<T> columns(s.width), rows(s.height);
  const int64_t right = s.width > 1 ? 1 : 0, down = s.height > 1 ? s.width : 0, pixel_stride = groups * channels;
  const int64_t pixels_at_once = pixels_of_block(s, groups), end = last_row * s.width_out;
  for (int64_t start = first_row * s.width_out; start < end; start += pixels_at_once) {
    const int64_t count = start + pixels_at_once <= end ? pixels_at_once : end - start;
    const int64_t units = count * groups, n = units * points, pixel = image * s.height_out * s.width_out + start;
    const Block block{pixel, count, start % s.width_out, start / s.width_out, group, groups};
    place<T, S, P>(
        p, s, block, static_cast<const S*>(a.offset), static_cast<const S*>(a.mask), origins_x, origins_y, scale);
    if (s.softmax) softmax<T, P>(p.mask, units, points);
    // what follows to a full register does not count
    for (int64_t i = n; i < n + lanes<T>; ++i) p.x[i] = p.x[n - 1], p.y[i] = p.y[n - 1], p.mask[i] = 0;
    int64_t low = s.height, high = 0;
    locate<true>(p, n, columns, rows, s.width, &low, &high);
    high = high + 2 < s.height ? high + 2 : s.height;
    if (range[0] == range[1]) {
      clear_rows(s, sums, pixel_stride, low, high);
      range[0] = low, range[1] = high;
    } else {
      if (low < range[0]) clear_rows(s, sums, pixel_stride, low, range[0]), range[0] = low;
      if (high > range[1]) clear_rows(s, sums, pixel_stride, range[1], high), range[1] = high;
    }

    const S* gradients = static_cast<const S*>(a.grad_output) + pixel * s.channels + group * channels;
    int64_t unit = 0;
    for (int64_t q = 0; q < count; ++q) {
      for (int64_t g = 0; g < groups; ++g, ++unit) {
        const S* gradient = gradients + q * s.channels + g * channels;
        for_pieces<D>(channels, [&]<int B>(int64_t c) __attribute__((always_inline)) {
          multiply<T, S, P, B>(
              p, unit * points, points, s.channels, gradient + c, input + g * channels + c, right * s.channels,
              down * s.channels, c == 0);
        });
      }
    }
    for (int64_t i = 4 * n; i < 4 * n + 4 * lanes<T>; ++i) p.dots[i] = 0;
    const bool finite = all_finite(p.dots, 4 * n) && all_finite(p.mask, n);
    unit = 0;
    for (int64_t q = 0; q < count; ++q) {
      for (int64_t g = 0; g < groups; ++g, ++unit) {
        const S* gradient = gradients + q * s.channels + g * channels;
        T* group_sums = sums + g * channels;
        if (__builtin_expect(!finite, 0)) {
          bool unit_is_finite = true;
          for (int64_t i = 4 * unit * points; i < 4 * (unit + 1) * points; ++i) unit_is_finite &= is_finite(p.dots[i]);
          for (int64_t i = unit * points; i < (unit + 1) * points; ++i) unit_is_finite &= is_finite(p.mask[i]);
          if (!unit_is_finite) {
            scatter_exactly<T, S, D>(
                p, unit * points, s, channels, gradient, input + g * channels, group_sums, pixel_stride);
            continue;
          }
        }
        for_pieces<D>(channels, [&]<int B>(int64_t c) __attribute__((always_inline)) {
          scatter<T, S, P, B>(
              p, unit * points, points, pixel_stride, gradient + c, group_sums + c, right * pixel_stride,
              down * pixel_stride);
        });
      }
    }
    differentiate<T, S, P>(a, p, block, columns, rows, finite);
  }
}

// Memory of one thread: points, and (H, W, groups * D) sums unless they have a place already.
template <class T>
struct BackwardScratch {
  int64_t capacity;
  size_t points, sums;
  explicit BackwardScratch(const BackwardArguments& a) {
    const Shape& s = a.shape;
    capacity = block_capacity(s, a.groups_at_once);
    points = (Points<T>::bytes(capacity) + 63) / 64 * 64;
    sums = a.in_place || a.slices > 1 ? 0 : a.groups_at_once * s.height * s.width * s.group_channels * sizeof(T);
  }
  size_t bytes() const { return points + sums; }
};

// The (H, W, groups * D) sums of some groups of a slice of an image: in the result itself for the first slice if they may be.
template <class T>
DCNV3_INLINE T* sums_of_slice(const BackwardArguments& a, int64_t slice, int64_t image, int64_t group) {
  const Shape& s = a.shape;
  const bool in_result = a.in_place && slice == 0;
  T* first = static_cast<T*>(in_result ? a.grad_input : a.partial);
  const int64_t buffer = in_result ? 0 : slice - (a.in_place ? 1 : 0);
  return first + ((buffer * s.batch + image) * s.groups + group) * s.height * s.width * s.group_channels;
}

// `groups` groups of a row, from the sums of some slices, or zeros if there are none.
template <class T, class S, int D>
DCNV3_INLINE void finish_row(const Shape& s, const T* const* slices, int64_t count, int64_t groups, S* to) {
  const int64_t channels = D ? D : s.group_channels;
  for (int64_t x = 0; x < s.width; ++x) {
    for (int64_t g = 0; g < groups; ++g) {
      for_pieces<D>(channels, [&]<int B>(int64_t c) __attribute__((always_inline)) {
        typedef Piece<T, S, B> Channels;
        typename Channels::V sum[Channels::count] = {};
        for (int64_t slice = 0; slice < count; ++slice) {
          const T* from = slices[slice] + (x * groups + g) * channels + c;
          for (int j = 0; j < Channels::count; ++j) sum[j] += load<T, Channels::width>(from + j * Channels::width);
        }
        Channels::write(sum, to + x * s.channels + g * channels + c);
      });
    }
  }
}

template <class T, class S, int P, int D>
void backward_tasks(const BackwardArguments& a, int64_t begin, int64_t end, void* scratch) {
  const Shape& s = a.shape;
  const BackwardScratch<T> sizes(a);
  char* memory = static_cast<char*>(scratch);
  Points<T> p(memory, sizes.capacity);
  p.set_kernel(s, a.groups_at_once);
  T* own_sums = reinterpret_cast<T*>(memory + sizes.points);
  const bool own = !a.in_place && a.slices == 1;
  const int64_t channels = D ? D : s.group_channels;
  const int64_t chunks = (s.groups + a.groups_at_once - 1) / a.groups_at_once;
  for (int64_t task = begin; task < end; ++task) {
    // slices outermost: neighbouring groups of a pixel share cache lines, which two threads had better not write
    const int64_t chunk = task % chunks, image = task / chunks % s.batch, slice = task / chunks / s.batch;
    const int64_t group = chunk * a.groups_at_once;
    const int64_t groups = group + a.groups_at_once <= s.groups ? a.groups_at_once : s.groups - group;
    T* sums = own ? own_sums : sums_of_slice<T>(a, slice, image, group);
    int64_t own_range[2];
    int64_t* range = a.slices > 1 ? a.ranges + 2 * task : own_range;
    range[0] = range[1] = 0;
    backward_rows<T, S, P, D>(
        a, p, image, group, groups, s.height_out * slice / a.slices, s.height_out * (slice + 1) / a.slices, sums, range);
    if (a.in_place && slice == 0) {
      clear_rows(s, sums, s.channels, 0, range[0]);
      clear_rows(s, sums, s.channels, range[1], s.height);
    }
    if (!own) continue;
    S* to = static_cast<S*>(a.grad_input) + image * s.height * s.width * s.channels + group * channels;
    for (int64_t y = 0; y < s.height; ++y) {
      const T* const from[1] = {sums + y * s.width * groups * channels};
      finish_row<T, S, D>(s, from, y >= range[0] && y < range[1], groups, to + y * s.width * s.channels);
    }
  }
}

template <class T, class S, int P, int D>
void reduce_slices(const BackwardArguments& a, int64_t begin, int64_t end) {
  const Shape& s = a.shape;
  const int64_t channels = D ? D : s.group_channels;
  const int64_t chunks = (s.groups + a.groups_at_once - 1) / a.groups_at_once;
  for (int64_t image_row = begin; image_row < end; ++image_row) {
    const int64_t image = image_row / s.height, y = image_row % s.height;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t group = chunk * a.groups_at_once;
      const int64_t groups = group + a.groups_at_once <= s.groups ? a.groups_at_once : s.groups - group;
      const T* used[max_slices];
      int64_t count = 0;
      for (int64_t slice = 0; slice < a.slices; ++slice) {
        const int64_t* range = a.ranges + 2 * ((slice * s.batch + image) * chunks + chunk);
        const bool in_range = y >= range[0] && y < range[1], in_result = a.in_place && slice == 0;
        if (in_range || in_result) used[count++] = sums_of_slice<T>(a, slice, image, group) + y * s.width * groups * channels;
      }
      if (a.in_place && count == 1) continue;
      S* to = static_cast<S*>(a.grad_input) + image_row * s.width * s.channels + group * channels;
      finish_row<T, S, D>(s, used, count, groups, to);
    }
  }
}

// ------------------------------------------------------------------------------------------------- choice of templates

// Calls `function<P, D>` for the group widths and the numbers of points that have code of their own.
#define DCNV3_SPECIALISED(function, T, S, shape, ...)                     \
  do {                                                                    \
    if ((shape).points == 9 && (shape).group_channels == 16) {            \
      function<T, S, 9, 16>(__VA_ARGS__);                                 \
    } else if ((shape).points == 9 && (shape).group_channels == 32) {     \
      function<T, S, 9, 32>(__VA_ARGS__);                                 \
    } else if ((shape).points == 9 && (shape).group_channels == 8) {      \
      function<T, S, 9, 8>(__VA_ARGS__);                                  \
    } else {                                                              \
      function<T, S, 0, 0>(__VA_ARGS__);                                  \
    }                                                                     \
  } while (0)

size_t forward_scratch(const ForwardArguments& a) {
  return Points<double>::bytes(block_capacity(a.shape, groups_of_block(a.shape)));
}

void forward(const ForwardArguments& a, int64_t begin, int64_t end, void* scratch) {
  switch (a.dtype) {
    case Dtype::float32:
      DCNV3_SPECIALISED(forward_pixels, float, float, a.shape, a, begin, end, scratch);
      break;
    case Dtype::bfloat16:
      DCNV3_SPECIALISED(forward_pixels, float, BFloat16, a.shape, a, begin, end, scratch);
      break;
    case Dtype::float16:
      DCNV3_SPECIALISED(forward_pixels, float, Half, a.shape, a, begin, end, scratch);
      break;
    case Dtype::float64:
      forward_pixels<double, double, 0, 0>(a, begin, end, scratch);
      break;
  }
}

size_t backward_scratch(const BackwardArguments& a) {
  return a.dtype == Dtype::float64 ? BackwardScratch<double>(a).bytes() : BackwardScratch<float>(a).bytes();
}

void backward(const BackwardArguments& a, int64_t begin, int64_t end, void* scratch) {
  switch (a.dtype) {
    case Dtype::float32:
      DCNV3_SPECIALISED(backward_tasks, float, float, a.shape, a, begin, end, scratch);
      break;
    case Dtype::bfloat16:
      DCNV3_SPECIALISED(backward_tasks, float, BFloat16, a.shape, a, begin, end, scratch);
      break;
    case Dtype::float16:
      DCNV3_SPECIALISED(backward_tasks, float, Half, a.shape, a, begin, end, scratch);
      break;
    case Dtype::float64:
      backward_tasks<double, double, 0, 0>(a, begin, end, scratch);
      break;
  }
}

void backward_reduce(const BackwardArguments& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case Dtype::float32:
      DCNV3_SPECIALISED(reduce_slices, float, float, a.shape, a, begin, end);
      break;
    case Dtype::bfloat16:
      DCNV3_SPECIALISED(reduce_slices, float, BFloat16, a.shape, a, begin, end);
      break;
    case Dtype::float16:
      DCNV3_SPECIALISED(reduce_slices, float, Half, a.shape, a, begin, end);
      break;
    case Dtype::float64:
      reduce_slices<double, double, 0, 0>(a, begin, end);
      break;
  }
}

}  // namespace
}  // namespace DCNV3_ISA

#define DCNV3_STRING_(name) #name
#define DCNV3_STRING(name) DCNV3_STRING_(name)
#define DCNV3_JOIN_(name) name##_kernels
#define DCNV3_JOIN(name) DCNV3_JOIN_(name)
extern const Kernels DCNV3_JOIN(DCNV3_ISA);
const Kernels DCNV3_JOIN(DCNV3_ISA) = {
    DCNV3_STRING(DCNV3_ISA),     DCNV3_ISA::forward_scratch, DCNV3_ISA::forward,
    DCNV3_ISA::backward_scratch, DCNV3_ISA::backward,        DCNV3_ISA::backward_reduce,
};

}  // namespace dcnv3
