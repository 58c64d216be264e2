// The arithmetic of DCNv3 on CPUs, written once and compiled for several instruction sets: the including file defines
//   DCNV3_ISA            the name of the set and of the namespace
//   DCNV3_VECTOR_BYTES   the width of its vector registers
//   DCNV3_F16C           whether it converts float16 in hardware
// and chooses the set (`#pragma GCC target`) after the standard headers and before this one. Nothing of the standard library
// is instantiated here, so no function that the linker may share is compiled for a set that the machine may lack.
//
// A unit of work is one group of one output pixel: 4 * P short rows of the input, D channels each, times a weight each. All
// that does not depend on the channel (location, bilinear weights, softmax) is computed once, vectorised over the points;
// the sums are vectorised over the channels. Corners outside the image are clamped into it and get the weight zero; as
// 0 * inf is not 0, what is not finite is computed again, by branches.

namespace dcnv3 {
namespace DCNV3_ISA {
namespace {

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
  for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i]);
}

// True unless every value is finite.
template <class T>
DCNV3_INLINE bool not_finite(const T* values, int64_t n) {
  int bad = 0;
  for (int64_t i = 0; i < n; ++i) bad |= !(values[i] - values[i] == T(0));
  return bad;
}

// ------------------------------------------------------------------------------------------------------------- softmax

// exp(x) for x <= 0, to about one unit in the last place; 0 below the normal range, NaN for NaN.
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

// Softmax over each `points` consecutive values, in place. Memory to the next multiple of 16 values is overwritten. With
// `inverse`, what remains to be done is written there instead: the factor of each group.
template <class T, int P>
DCNV3_INLINE void softmax(T* values, int64_t count, int64_t dynamic_points, T* inverse = nullptr) {
  const int64_t points = P ? P : dynamic_points;
  const int64_t n = count * points;
  // One maximum for all groups, where it is close to every group's own: the division takes it out again.
  constexpr int L = lanes<T>;
  for (int64_t i = n; i < (n + L - 1) / L * L; ++i) values[i] = values[0];
  Register<T> high = load<T, L>(values), low = high;
  for (int64_t i = L; i < n; i += L) {
    const Register<T> v = load<T, L>(values + i);
    high = v > high ? v : high;
    low = v < low ? v : low;
  }
  T highest = high[0], lowest = low[0];
  for (int i = 1; i < L; ++i) {
    highest = high[i] > highest ? high[i] : highest;
    lowest = low[i] < lowest ? low[i] : lowest;
  }
  if (__builtin_expect(!(highest - lowest < T(20)), 0)) {
    for (int64_t g = 0; g < count; ++g) {
      T* group = values + g * points;
      T maximum = group[0];
      for (int64_t i = 1; i < points; ++i) maximum = group[i] > maximum ? group[i] : maximum;
      for (int64_t i = 0; i < points; ++i) group[i] -= maximum;
    }
    highest = 0;
  }
  for (int64_t i = 0; i < n; i += L) store<T, L>(values + i, exponential<T>(load<T, L>(values + i) - highest));
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

// What the points of a block need, structures of arrays. `capacity` points each.
template <class T, class I>
struct Points {
  T *x, *y, *mask;         // positions, and the (normalised) modulation
  T* weight[4];            // bilinear, 0 outside; upper left, upper right, lower left, lower right
  T *fx, *fy;              // fractional parts
  I* index[4];             // of the pixel in the image, times the stride given to `locate`
  int32_t* valid[4];       // whether the corner lies in the image
  T *kernel_x, *kernel_y;  // the regular grid, dilated and scaled, repeated for every group
  T* by_mask;              // the gradient of the modulation
  T* dots;                 // of the four corners with the output's gradient, (capacity, 4)

  static size_t bytes(int64_t capacity) { return round_up(capacity) * (16 * sizeof(T) + 4 * sizeof(I) + 16); }
  static int64_t round_up(int64_t n) { return (n + 15) / 16 * 16; }

  Points(char* memory, int64_t capacity) {
    const int64_t n = round_up(capacity);
    T* values = reinterpret_cast<T*>(memory);
    x = values, y = x + n, mask = y + n, fx = mask + n, fy = fx + n, kernel_x = fy + n, kernel_y = kernel_x + n;
    for (int k = 0; k < 4; ++k) weight[k] = kernel_y + (k + 1) * n;
    by_mask = kernel_y + 5 * n, dots = by_mask + n;
    I* indices = reinterpret_cast<I*>(dots + 4 * n);
    for (int k = 0; k < 4; ++k) index[k] = indices + k * n;
    int32_t* flags = reinterpret_cast<int32_t*>(indices + 4 * n);
    for (int k = 0; k < 4; ++k) valid[k] = flags + k * n;
  }

  void set_kernel(const Shape& s, int64_t repeats) {
    int64_t i = 0;
    for (int64_t r = 0; r < repeats; ++r) {
      for (int64_t column = 0; column < s.kernel_w; ++column) {
        for (int64_t row = 0; row < s.kernel_h; ++row) {
          if (s.remove_center && column == s.kernel_w / 2 && row == s.kernel_h / 2) continue;
          kernel_x[i] = T(column) * T(double(s.dilation_w) * s.offset_scale);
          kernel_y[i] = T(row) * T(double(s.dilation_h) * s.offset_scale);
          ++i;
        }
      }
    }
  }
};

// Where the kernel's first point lies, without offset, along one axis: `start + out * stride`.
template <class T>
struct Origin {
  T start, stride;
  Origin(int64_t step, int64_t padding, int64_t dilation, int64_t kernel, double scale) : stride(T(step)) {
    const double half = double((dilation * (kernel - 1)) / 2);
    start = T(half - double(padding) - half * scale);
  }
  T operator()(int64_t out) const { return T(out) * stride + start; }
};

// Positions of n points (and what follows to a full register) from their offsets, x and y in turns.
template <class T, class S, class I>
DCNV3_INLINE void place(const Points<T, I>& p, const S* offset, int64_t n, T origin_x, T origin_y, T scale) {
  constexpr int L = lanes<T>;
  typedef MaskRegister<T> M;
  M even, odd;
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) even[i] = 2 * i, odd[i] = 2 * i + 1;
  for (int64_t i = 0; i < n; i += L) {
    const S* from = offset + 2 * i;
    S rest[2 * L];
    if (i + L > n) {
      __builtin_memset(rest, 0, sizeof(rest));
      __builtin_memcpy(rest, from, 2 * (n - i) * sizeof(S));
      from = rest;
    }
    const Register<T> first = load<T, L>(from), second = load<T, L>(from + L);
    const Register<T> x = shuffle(first, second, even), y = shuffle(first, second, odd);
    store<T, L>(p.x + i, (load<T, L>(p.kernel_x + i) + origin_x) + x * scale);
    store<T, L>(p.y + i, (load<T, L>(p.kernel_y + i) + origin_y) + y * scale);
  }
}

// Fills weights and indices of n points (and what follows to a full register) from their positions. What is not strictly
// inside (-1, size), NaN included, has no valid corner. Forward, weights include the modulation; backward they do not, and
// fractional parts are kept.
template <bool Backward, class T, class I>
DCNV3_INLINE void locate(const Points<T, I>& p, int64_t n, int64_t height, int64_t width, int64_t stride) {
  constexpr int L = lanes<T>;
  typedef Register<T> V;
  typedef MaskRegister<T> M;
  typedef Vector<int32_t, L> Int;
  typedef Vector<I, L> Index;
  const int32_t last_x = int32_t(width - 1), last_y = int32_t(height - 1);
  const T end_x = T(width), end_y = T(height);
  const I step_x = I(stride), step_y = I(width * stride);
  const V zero = {};
  for (int64_t i = 0; i < n; i += L) {
    const V x = load<T, L>(p.x + i), y = load<T, L>(p.y + i);
    const M inside = (x > T(-1)) & (x < end_x) & (y > T(-1)) & (y < end_y);
    const V px = inside ? x : zero, py = inside ? y : zero;
    Int x0 = __builtin_convertvector(px, Int), y0 = __builtin_convertvector(py, Int);
    x0 += __builtin_convertvector(px < __builtin_convertvector(x0, V), Int);  // truncation to floor
    y0 += __builtin_convertvector(py < __builtin_convertvector(y0, V), Int);
    const V fx = px - __builtin_convertvector(x0, V), fy = py - __builtin_convertvector(y0, V);
    const Int in = __builtin_convertvector(inside, Int);
    const Int left = (x0 >= 0) & in, right = (x0 < last_x) & in, top = y0 >= 0, bottom = y0 < last_y;
    const Int none = {};
    const Index c0 = __builtin_convertvector(x0 > 0 ? x0 : none, Index) * step_x;
    const Index c1 = __builtin_convertvector(x0 < last_x ? x0 + 1 : none + last_x, Index) * step_x;
    const Index r0 = __builtin_convertvector(y0 > 0 ? y0 : none, Index) * step_y;
    const Index r1 = __builtin_convertvector(y0 < last_y ? y0 + 1 : none + last_y, Index) * step_y;
    store<I, L>(p.index[0] + i, r0 + c0);
    store<I, L>(p.index[1] + i, r0 + c1);
    store<I, L>(p.index[2] + i, r1 + c0);
    store<I, L>(p.index[3] + i, r1 + c1);
    const Int valid[4] = {top & left, top & right, bottom & left, bottom & right};
    const V gx = T(1) - fx, gy = T(1) - fy;
    const V weight[4] = {gy * gx, gy * fx, fy * gx, fy * fx};
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      V w = __builtin_convertvector(valid[k], M) ? weight[k] : zero;
      if (!Backward) w *= load<T, L>(p.mask + i);  // 0 * mask: a mask that is not finite shows, as in the definition
      store<T, L>(p.weight[k] + i, w);
      if (Backward) store<int32_t, L>(p.valid[k] + i, valid[k]);
    }
    if (Backward) {
      store<T, L>(p.fx + i, fx);
      store<T, L>(p.fy + i, fy);
    }
  }
}

// ------------------------------------------------------------------------------------------------------------- forward

constexpr int accumulators(int vector_bytes) {
  // as many as fit into about half of the registers, at most one for each corner
  return vector_bytes >= 4 * DCNV3_VECTOR_BYTES ? 1 : vector_bytes >= 2 * DCNV3_VECTOR_BYTES ? 2 : 4;
}

// One group's B channels of one output pixel.
template <class T, class S, class I, int P, int B>
DCNV3_INLINE void gather(const Points<T, I>& p, int64_t at, int64_t dynamic_points, T factor, const S* base, T* to) {
  constexpr int A = accumulators(B * sizeof(T));
  const int64_t points = P ? P : dynamic_points;
  Vector<T, B> sum[A] = {};
#pragma GCC unroll 9
  for (int64_t i = at; i < at + points; ++i) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) sum[k % A] += p.weight[k][i] * load<T, B>(base + p.index[k][i]);
  }
  if (A == 4) sum[0] = (sum[0] + sum[1]) + (sum[2 % A] + sum[3 % A]);
  if (A == 2) sum[0] += sum[1 % A];
  store<T, B>(to, sum[0] * factor);
}

template <class T, class S, class I, int P, int D>
DCNV3_INLINE void gather_group(
    const Points<T, I>& p, int64_t at, int64_t points, int64_t channels, T factor, const S* base, T* to) {
  if constexpr (D != 0) {
    gather<T, S, I, P, D>(p, at, points, factor, base, to);
  } else {
    int64_t c = 0;
    for (; c + 16 <= channels; c += 16) gather<T, S, I, P, 16>(p, at, points, factor, base + c, to + c);
    for (; c + 4 <= channels; c += 4) gather<T, S, I, P, 4>(p, at, points, factor, base + c, to + c);
    for (; c < channels; ++c) gather<T, S, I, P, 1>(p, at, points, factor, base + c, to + c);
  }
}

// The same by branches: corners outside the image are not touched.
template <class T, class S, class I>
__attribute__((noinline)) void gather_exactly(
    const Points<T, I>& p, int64_t at, int64_t points, int64_t channels, const S* base, T* to) {
  for (int64_t c = 0; c < channels; ++c) {
    T total = 0;
    for (int64_t i = at; i < at + points; ++i) {
      const T fx = p.fx[i], fy = p.fy[i];
      const T weight[4] = {(1 - fy) * (1 - fx), (1 - fy) * fx, fy * (1 - fx), fy * fx};
      T sampled = 0;
      for (int k = 0; k < 4; ++k) {
        if (p.valid[k][i]) sampled += weight[k] * T(widen(base[p.index[k][i] + c]));
      }
      total += sampled * p.mask[i];
    }
    to[c] = total;
  }
}

inline int64_t groups_per_block(const Shape& s) {
  const int64_t fitting = 512 / s.points;
  return fitting < 1 ? 1 : fitting < s.groups ? fitting : s.groups;
}

template <class T, class S, class I, int P, int D>
void forward_pixels(const ForwardArguments& a, int64_t begin, int64_t end, void* scratch) {
  const Shape& s = a.shape;
  const int64_t at_once = groups_per_block(s), points = P ? P : s.points;
  const int64_t channels = D ? D : s.group_channels;
  Points<T, I> p(static_cast<char*>(scratch), at_once * points);
  T* row = reinterpret_cast<T*>(static_cast<char*>(scratch) + Points<T, I>::bytes(at_once * points));
  p.set_kernel(s, at_once);
  T* const factors = p.by_mask;  // of the groups' softmax
  const T scale = T(s.offset_scale);
  const Origin<T> origins_x(s.stride_w, s.padding_w, s.dilation_w, s.kernel_w, s.offset_scale);
  const Origin<T> origins_y(s.stride_h, s.padding_h, s.dilation_h, s.kernel_h, s.offset_scale);
  const int64_t pixels = s.height_out * s.width_out;
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    const int64_t image = pixel / pixels, x_out = pixel % s.width_out, y_out = pixel % pixels / s.width_out;
    const S* input = static_cast<const S*>(a.input) + image * s.height * s.width * s.channels;
    const T origin_x = origins_x(x_out), origin_y = origins_y(y_out);
    S* output = static_cast<S*>(a.output) + pixel * s.channels;
    for (int64_t group = 0; group < s.groups; group += at_once) {
      const int64_t count = group + at_once <= s.groups ? at_once : s.groups - group, n = count * points;
      const int64_t first = (pixel * s.groups + group) * points;
      const S* offset = static_cast<const S*>(a.offset) + first * 2;
      place(p, offset, n, origin_x, origin_y, scale);
      widen_row(static_cast<const S*>(a.mask) + first, p.mask, n);
      if (s.softmax) softmax<T, P>(p.mask, count, points, factors);
      locate<false>(p, n, s.height, s.width, s.channels);
      T* to = row;
      if constexpr (sizeof(T) == sizeof(S)) to = reinterpret_cast<T*>(output + group * channels);
      const S* base = input + group * channels;
      for (int64_t g = 0; g < count; ++g) {
        const T factor = s.softmax ? factors[g] : T(1);
        gather_group<T, S, I, P, D>(p, g * points, points, channels, factor, base + g * channels, to + g * channels);
      }
      if (__builtin_expect(not_finite(to, count * channels), 0)) {
        locate<true>(p, n, s.height, s.width, s.channels);
        for (int64_t g = 0; g < count; ++g) {
          for (int64_t i = g * points; s.softmax && i < (g + 1) * points; ++i) p.mask[i] *= factors[g];
          gather_exactly(p, g * points, points, channels, base + g * channels, to + g * channels);
        }
      }
      if constexpr (sizeof(T) != sizeof(S)) narrow_row(to, output + group * channels, count * channels);
    }
  }
}

// ------------------------------------------------------------------------------------------------------------ backward

constexpr int64_t pixels_per_block = 16;

template <class T, int B>
struct FourSums {
  // The sums of four vectors, as one vector of four.
  static DCNV3_INLINE Vector<T, 4> of(Vector<T, B> a, Vector<T, B> b, Vector<T, B> c, Vector<T, B> d) {
    return FourSums<T, B / 2>::of(fold(a), fold(b), fold(c), fold(d));
  }
  static DCNV3_INLINE Vector<T, B / 2> fold(Vector<T, B> v) {
    union {
      Vector<T, B> whole;
      Vector<T, B / 2> halves[2];
    } u;
    u.whole = v;
    return u.halves[0] + u.halves[1];
  }
};
template <class T>
struct FourSums<T, 4> {
  static DCNV3_INLINE Vector<T, 4> of(Vector<T, 4> a, Vector<T, 4> b, Vector<T, 4> c, Vector<T, 4> d) {
    typedef Vector<typename MaskOf<T>::type, 4> M;
    const Vector<T, 4> ab = shuffle(a, b, M{0, 4, 1, 5}) + shuffle(a, b, M{2, 6, 3, 7});
    const Vector<T, 4> cd = shuffle(c, d, M{0, 4, 1, 5}) + shuffle(c, d, M{2, 6, 3, 7});
    return shuffle(ab, cd, M{0, 1, 4, 5}) + shuffle(ab, cd, M{2, 3, 6, 7});
  }
};
template <class T>
struct FourSums<T, 16> {
  static DCNV3_INLINE Vector<T, 4> of(Vector<T, 16> a, Vector<T, 16> b, Vector<T, 16> c, Vector<T, 16> d) {
    typedef Vector<typename MaskOf<T>::type, 16> M;
    const M low = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
    const Vector<T, 16> ab = shuffle(a, b, low) + shuffle(a, b, low + 8);
    const Vector<T, 16> cd = shuffle(c, d, low) + shuffle(c, d, low + 8);
    const M quarters = {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27};
    Vector<T, 16> sums = shuffle(ab, cd, quarters) + shuffle(ab, cd, quarters + 4);  // four lanes of four
    sums += shuffle(sums, sums, M{1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14});
    sums += shuffle(sums, sums, M{2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13});
    sums = shuffle(sums, sums, M{0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12});
    union {
      Vector<T, 16> whole;
      Vector<T, 4> parts[4];
    } u;
    u.whole = sums;
    return u.parts[0];
  }
};
template <class T>
struct FourSums<T, 1> {
  static DCNV3_INLINE Vector<T, 4> of(Vector<T, 1> a, Vector<T, 1> b, Vector<T, 1> c, Vector<T, 1> d) {
    return Vector<T, 4>{a[0], b[0], c[0], d[0]};
  }
};

// One point, B channels: adds to the four corners of the input's gradient, returns the four corners' dot products with
// the output's gradient.
template <class T, class S, int B>
DCNV3_INLINE Vector<T, 4> scatter(
    const S* const (&from)[4], T* const (&to)[4], const T (&weight)[4], const T* gradient, int64_t channel) {
  const Vector<T, B> grad = load<T, B>(gradient + channel);
  Vector<T, B> product[4];
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    product[k] = grad * load<T, B>(from[k] + channel);
    store<T, B>(to[k] + channel, load<T, B>(to[k] + channel) + grad * weight[k]);
  }
  return FourSums<T, B>::of(product[0], product[1], product[2], product[3]);
}

template <class T, class S, int D>
DCNV3_INLINE Vector<T, 4> scatter_group(
    const S* const (&from)[4], T* const (&to)[4], const T (&weight)[4], const T* gradient, int64_t channels) {
  if constexpr (D != 0) {
    return scatter<T, S, D>(from, to, weight, gradient, 0);
  } else {
    Vector<T, 4> dots = {};
    int64_t c = 0;
    for (; c + 16 <= channels; c += 16) dots += scatter<T, S, 16>(from, to, weight, gradient, c);
    for (; c + 4 <= channels; c += 4) dots += scatter<T, S, 4>(from, to, weight, gradient, c);
    for (; c < channels; ++c) dots += scatter<T, S, 1>(from, to, weight, gradient, c);
    return dots;
  }
}

// All points of a block of pixels: adds to `sums`, fills `dots`.
template <class T, class S, int P, int D>
DCNV3_INLINE void scatter_block(
    const Points<T, int32_t>& p, int64_t count, int64_t dynamic_points, int64_t channels, int64_t pixel_stride,
    const T* gradients, const S* input, T* sums) {
  const int64_t points = P ? P : dynamic_points;
  for (int64_t q = 0; q < count; ++q) {
    const T* gradient = gradients + q * channels;
    for (int64_t i = q * points; i < (q + 1) * points; ++i) {
      const T mask = p.mask[i];
      const S* from[4];
      T* to[4];
      T weight[4];
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        const int64_t index = p.index[k][i];
        from[k] = input + index * pixel_stride;
        to[k] = sums + index * channels;
        weight[k] = p.weight[k][i] * mask;
      }
      store<T, 4>(p.dots + 4 * i, scatter_group<T, S, D>(from, to, weight, gradient, channels));
    }
  }
}

// The same by branches: corners outside the image are not touched.
template <class T, class S>
__attribute__((noinline)) void scatter_exactly(
    const Points<T, int32_t>& p, int64_t count, int64_t points, int64_t channels, int64_t pixel_stride,
    const T* gradients, const S* input, T* sums) {
  for (int64_t i = 0; i < count * points; ++i) {
    const T* gradient = gradients + i / points * channels;
    for (int k = 0; k < 4; ++k) {
      T dot = 0;
      if (p.valid[k][i]) {
        const int64_t index = p.index[k][i];
        const T weight = p.weight[k][i] * p.mask[i];
        for (int64_t c = 0; c < channels; ++c) {
          sums[index * channels + c] += gradient[c] * weight;
          dot += gradient[c] * T(widen(input[index * pixel_stride + c]));
        }
      }
      p.dots[4 * i + k] = dot;
    }
  }
}

// The gradient of one group of one image for the output rows [first_row, last_row). `sums` is (H, W, D).
template <class T, class S, int P, int D>
DCNV3_INLINE void backward_rows(
    const BackwardArguments& a, const Points<T, int32_t>& p, T* gradients, int64_t image, int64_t group,
    int64_t first_row, int64_t last_row, T* sums) {
  const Shape& s = a.shape;
  const int64_t points = P ? P : s.points, channels = D ? D : s.group_channels;
  const T scale = T(s.offset_scale);
  const S* input = static_cast<const S*>(a.input) + image * s.height * s.width * s.channels + group * channels;
  const Origin<T> origins_x(s.stride_w, s.padding_w, s.dilation_w, s.kernel_w, s.offset_scale);
  const Origin<T> origins_y(s.stride_h, s.padding_h, s.dilation_h, s.kernel_h, s.offset_scale);
  const int64_t image_pixel = image * s.height_out * s.width_out;
  int64_t x_out = 0, y_out = first_row;
  const int64_t end = last_row * s.width_out;
  for (int64_t start = first_row * s.width_out; start < end; start += pixels_per_block) {
    const int64_t count = start + pixels_per_block <= end ? pixels_per_block : end - start, n = count * points;
    for (int64_t q = 0; q < count; ++q) {
      const int64_t pixel = start + q, at = q * points;
      const int64_t first = ((image_pixel + pixel) * s.groups + group) * points;
      const S* offset = static_cast<const S*>(a.offset) + first * 2;
      const S* mask = static_cast<const S*>(a.mask) + first;
      const T origin_x = origins_x(x_out), origin_y = origins_y(y_out);
      if (++x_out == s.width_out) x_out = 0, ++y_out;
      for (int64_t i = 0; i < points; ++i) {
        p.x[at + i] = (origin_x + p.kernel_x[i]) + T(widen(offset[2 * i])) * scale;
        p.y[at + i] = (origin_y + p.kernel_y[i]) + T(widen(offset[2 * i + 1])) * scale;
        p.mask[at + i] = widen(mask[i]);
      }
      widen_row(
          static_cast<const S*>(a.grad_output) + (image_pixel + pixel) * s.channels + group * channels,
          gradients + q * channels, channels);
    }
    if (s.softmax) softmax<T, P>(p.mask, count, points);
    locate<true>(p, n, s.height, s.width, 1);

    if (__builtin_expect(not_finite(gradients, count * channels), 0)) {
      scatter_exactly(p, count, points, channels, s.channels, gradients, input, sums);
    } else {
      scatter_block<T, S, P, D>(p, count, points, channels, s.channels, gradients, input, sums);
    }

    constexpr int L = lanes<T>;
    typedef Register<T> V;
    typedef MaskRegister<T> M;
    M by_corner, halves;
    for (int j = 0; j < L / 2; ++j) {
      by_corner[j] = 4 * j, by_corner[L / 2 + j] = 4 * j + 1;
      halves[j] = j, halves[L / 2 + j] = L + j;
    }
    T* const by_x = p.x;  // positions are not needed any more
    T* const by_y = p.y;
    T* const by_mask = p.by_mask;
    for (int64_t i = 0; i < n; i += L) {
      V d[4], from[4];
      for (int k = 0; k < 4; ++k) from[k] = load<T, L>(p.dots + 4 * i + k * L);
      for (int k = 0; k < 4; k += 2) {  // from corners by points to points by corners
        const V one = shuffle(from[0], from[1], by_corner + k), other = shuffle(from[2], from[3], by_corner + k);
        d[k] = shuffle(one, other, halves);
        d[k + 1] = shuffle(one, other, halves + L / 2);
      }
      for (int k = 0; k < 4; ++k) {  // what lies outside is 0, whatever the clamped corner holds
        const auto valid = __builtin_convertvector(load<int32_t, L>(p.valid[k] + i), M);
        d[k] = valid ? d[k] : V{};
      }
      const V fx = load<T, L>(p.fx + i), fy = load<T, L>(p.fy + i), gx = T(1) - fx, gy = T(1) - fy;
      const V factor = load<T, L>(p.mask + i) * scale;
      store<T, L>(by_mask + i, gy * (gx * d[0] + fx * d[1]) + fy * (gx * d[2] + fx * d[3]));
      store<T, L>(by_x + i, (gy * (d[1] - d[0]) + fy * (d[3] - d[2])) * factor);
      store<T, L>(by_y + i, (gx * (d[2] - d[0]) + fx * (d[3] - d[1])) * factor);
    }
    for (int64_t q = 0; q < count; ++q) {
      const int64_t first = ((image_pixel + start + q) * s.groups + group) * points;
      S* __restrict grad_offset = static_cast<S*>(a.grad_offset) + first * 2;
      S* __restrict grad_mask = static_cast<S*>(a.grad_mask) + first;
      const int64_t at = q * points;
      T mean = 0;
      if (s.softmax) {
        for (int64_t i = at; i < at + points; ++i) mean += p.mask[i] * by_mask[i];
      }
      for (int64_t i = 0; i < points; ++i) {
        narrow(by_x[at + i], grad_offset + 2 * i);
        narrow(by_y[at + i], grad_offset + 2 * i + 1);
        narrow(s.softmax ? p.mask[at + i] * (by_mask[at + i] - mean) : by_mask[at + i], grad_mask + i);
      }
    }
  }
}

// Memory of one thread: points, the output's gradient of a block, and (H, W, D) sums.
template <class T>
struct BackwardScratch {
  int64_t capacity;
  size_t points, gradients, sums;
  explicit BackwardScratch(const BackwardArguments& a) {
    const Shape& s = a.shape;
    capacity = s.points * pixels_per_block;
    points = Points<T, int32_t>::bytes(capacity);
    gradients = (pixels_per_block * s.group_channels * sizeof(T) + 63) / 64 * 64;
    sums = a.slices > 1 ? 0 : s.height * s.width * s.group_channels * sizeof(T);
  }
  size_t bytes() const { return points + gradients + sums + 64; }
};

template <class T, class S, int P, int D>
void backward_tasks(const BackwardArguments& a, int64_t begin, int64_t end, void* scratch) {
  const Shape& s = a.shape;
  const BackwardScratch<T> sizes(a);
  char* memory = static_cast<char*>(scratch);
  Points<T, int32_t> p(memory, sizes.capacity);
  p.set_kernel(s, 1);
  T* gradients = reinterpret_cast<T*>(memory + sizes.points);
  T* own_sums = reinterpret_cast<T*>(memory + sizes.points + sizes.gradients);
  const int64_t area = s.height * s.width, channels = D ? D : s.group_channels;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t slice = task % a.slices, group = task / a.slices % s.groups, image = task / a.slices / s.groups;
    T* sums = a.slices > 1 ? static_cast<T*>(a.partial) + task * area * channels : own_sums;
    __builtin_memset(sums, 0, area * channels * sizeof(T));
    backward_rows<T, S, P, D>(
        a, p, gradients, image, group, s.height_out * slice / a.slices, s.height_out * (slice + 1) / a.slices, sums);
    if (a.slices > 1) continue;
    S* to = static_cast<S*>(a.grad_input) + image * area * s.channels + group * channels;
    for (int64_t i = 0; i < area; ++i) narrow_row(sums + i * channels, to + i * s.channels, channels);
  }
}

template <class T, class S>
void reduce_slices(const BackwardArguments& a, int64_t begin, int64_t end) {
  const Shape& s = a.shape;
  const int64_t area = s.height * s.width, channels = s.group_channels;
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    const int64_t image = pixel / area, place = pixel % area;
    for (int64_t group = 0; group < s.groups; ++group) {
      const T* from =
          static_cast<const T*>(a.partial) + ((image * s.groups + group) * a.slices * area + place) * channels;
      S* to = static_cast<S*>(a.grad_input) + pixel * s.channels + group * channels;
      for (int64_t c = 0; c < channels; ++c) {
        T sum = 0;
        for (int64_t slice = 0; slice < a.slices; ++slice) sum += from[slice * area * channels + c];
        narrow(sum, to + c);
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------- choice of templates

// An image of 2^31 elements or more needs wider indices in the forward pass (the backward pass counts pixels).
inline bool is_large(const Shape& s) { return s.height * s.width * s.channels > INT32_MAX; }

template <class T, class S, int P, int D>
void forward_as(const ForwardArguments& a, int64_t begin, int64_t end, void* scratch) {
  if (is_large(a.shape)) {
    forward_pixels<T, S, int64_t, 0, 0>(a, begin, end, scratch);
  } else {
    forward_pixels<T, S, int32_t, P, D>(a, begin, end, scratch);
  }
}

// Calls `function<P, D>` for the group widths and the numbers of points that have code of their own.
#define DCNV3_SPECIALISED(function, T, S, shape, ...)                     \
  do {                                                                    \
    if ((shape).points == 9 && (shape).group_channels == 16) {            \
      function<T, S, 9, 16>(__VA_ARGS__);                                 \
    } else if ((shape).points == 9 && (shape).group_channels == 32) {     \
      function<T, S, 9, 32>(__VA_ARGS__);                                 \
    } else if ((shape).points == 9 && (shape).group_channels == 8) {      \
      function<T, S, 9, 8>(__VA_ARGS__);                                  \
    } else if ((shape).points == 9) {                                     \
      function<T, S, 9, 0>(__VA_ARGS__);                                  \
    } else {                                                              \
      function<T, S, 0, 0>(__VA_ARGS__);                                  \
    }                                                                     \
  } while (0)

size_t forward_scratch(const ForwardArguments& a) {
  const int64_t capacity = groups_per_block(a.shape) * a.shape.points;
  const size_t row = groups_per_block(a.shape) * a.shape.group_channels * 8;
  return Points<double, int64_t>::bytes(capacity) + row + 64;
}

void forward(const ForwardArguments& a, int64_t begin, int64_t end, void* scratch) {
  switch (a.dtype) {
    case Dtype::float32:
      DCNV3_SPECIALISED(forward_as, float, float, a.shape, a, begin, end, scratch);
      break;
    case Dtype::bfloat16:
      DCNV3_SPECIALISED(forward_as, float, BFloat16, a.shape, a, begin, end, scratch);
      break;
    case Dtype::float16:
      DCNV3_SPECIALISED(forward_as, float, Half, a.shape, a, begin, end, scratch);
      break;
    case Dtype::float64:
      forward_as<double, double, 0, 0>(a, begin, end, scratch);
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
      reduce_slices<float, float>(a, begin, end);
      break;
    case Dtype::bfloat16:
      reduce_slices<float, BFloat16>(a, begin, end);
      break;
    case Dtype::float16:
      reduce_slices<float, Half>(a, begin, end);
      break;
    case Dtype::float64:
      reduce_slices<double, double>(a, begin, end);
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
