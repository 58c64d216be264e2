// The arithmetic of DCNv3 on GPUs.
//
// A unit of work is one group of one output pixel: P points, a softmax over them, and 4 * P short rows of the input, D channels
// each, times a weight each. A unit belongs to `lanes` neighbours of a warp. First they share its points among them: the four
// corners of each, and their weights, are computed once and put in shared memory. Then each lane sums V channels, 16 bytes of
// the input, over all points. Nothing crosses the borders of a warp, so a block never waits.
//
// Blocks take tiles of output pixels, two-dimensional ones, whose points overlap in the first-level cache; within a tile the
// group runs fastest, so the lanes of a warp write neighbouring memory.
//
// A corner outside the image is neither read nor added to: it has no number. A warp all of whose corners lie inside, as in the
// middle of an image, does not ask.
//
// Backward, additions to the gradient of the input in global memory are what takes the time: 4 * P rows a unit, and most meet
// at the same pixels. Where the points are close together (3 x 3, neither stride nor dilation) a worker therefore takes all
// units of one group in a tile, and adds them up in shared memory first: see `window_backward_kernel`.

#pragma once

#include <type_traits>

#include "dcnv3_cuda.h"
#include "dcnv3_platform.h"

namespace dcnv3 {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class T>
struct ComputeOf {
  typedef float type;
};
template <>
struct ComputeOf<double> {
  typedef double type;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

// Divides numbers below 2^31 by one that the host knows, without a division.
struct Divisor {
  uint32_t divisor, factor, shift;

  Divisor() = default;
  explicit Divisor(uint32_t by) : divisor(by), shift(0) {
    while ((uint64_t(1) << shift) < by) ++shift;
    factor = static_cast<uint32_t>((((uint64_t(1) << shift) - by) << 32) / by + 1);
  }
  DCNV3_DEVICE uint32_t operator()(uint32_t number) const { return (multiply_high(number, factor) + number) >> shift; }
};

// What a kernel needs to know of a call, and how the work is laid out. C: the type of its arithmetic.
template <class C>
struct Problem {
  int64_t tiles;
  Divisor by_tiles_per_image, by_tiles_x, by_groups;
  int tiles_x, tiles_per_image, tile_width_log2, tile_height_log2;
  Divisor by_tile_width;  // of a window, as the next two
  int tile_width, tile_height;
  int lanes, points;
  int height, width, height_out, width_out, channels, groups, group_channels;
  int kernel_h, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  int centre;  // the number of the point that is left out, else that of no point
  int half_h, half_w;  // from the kernel's first point to its centre, of which the positions of `locate` start
  C offset_scale;
  bool softmax;
};

// ----------------------------------------------------------------------------------------------------- loads and stores

DCNV3_DEVICE float widen(float value) { return value; }
DCNV3_DEVICE double widen(double value) { return value; }
DCNV3_DEVICE float widen(Half value) { return float_of_half(value.bits); }
DCNV3_DEVICE float widen(BFloat16 value) { return float_of_bits(static_cast<uint32_t>(value.bits) << 16); }

DCNV3_DEVICE void narrow(float value, float* to) { *to = value; }
DCNV3_DEVICE void narrow(double value, double* to) { *to = value; }
DCNV3_DEVICE void narrow(float value, Half* to) { to->bits = half_of_float(value); }
DCNV3_DEVICE void narrow(float value, BFloat16* to) { to->bits = bfloat16_of_float(value); }

template <int N>
DCNV3_DEVICE void unpack(const uint32_t (&words)[N], const float*, float* to) {
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = float_of_bits(words[i]);
}
template <int N>
DCNV3_DEVICE void unpack(const uint32_t (&words)[N], const double*, double* to) {
#pragma unroll
  for (int i = 0; i < N; i += 2) to[i / 2] = double_of_bits(words[i], words[i + 1]);
}
template <int N>
DCNV3_DEVICE void unpack(const uint32_t (&words)[N], const BFloat16*, float* to) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    to[2 * i] = float_of_bits(words[i] << 16);
    to[2 * i + 1] = float_of_bits(words[i] & 0xffff0000u);
  }
}
template <int N>
DCNV3_DEVICE void unpack(const uint32_t (&words)[N], const Half*, float* to) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    to[2 * i] = float_of_half(static_cast<uint16_t>(words[i]));
    to[2 * i + 1] = float_of_half(static_cast<uint16_t>(words[i] >> 16));
  }
}

// V neighbouring channels: one, or 16 bytes of them; of 16-bit numbers 8 bytes as well. Zeros where `inside` is false: then
// nothing is read.
template <int V, class T>
DCNV3_DEVICE void load_if(bool inside, const T* from, Compute<T> (&to)[V]) {
  if constexpr (V == 1) {
    to[0] = inside ? widen(*from) : Compute<T>(0);
  } else {
    constexpr int bytes = V * sizeof(T);
    static_assert(bytes == 8 || bytes == 16);
    std::conditional_t<bytes == 8, uint2, uint4> loaded{};
    if (inside) loaded = load_words<decltype(loaded)>(from);
    uint32_t words[bytes / 4];
    __builtin_memcpy(words, &loaded, bytes);
    unpack(words, from, to);
  }
}

template <int V, class T>
DCNV3_DEVICE void load(const T* from, Compute<T> (&to)[V]) {
  load_if<V>(true, from, to);
}

template <int V, class T>
DCNV3_DEVICE void store(const Compute<T> (&values)[V], T* to) {
  if constexpr (V == 1) {
    narrow(values[0], to);
  } else {
    static_assert(V * sizeof(T) == 16);
    struct {
      T values[V];
    } packed;
#pragma unroll
    for (int i = 0; i < V; ++i) narrow(values[i], &packed.values[i]);
    store_16_bytes(to, packed);
  }
}

// The sum over the lanes of a unit, in all of them.
template <class C>
DCNV3_DEVICE C sum_of_lanes(C value, int lanes) {
  for (int d = lanes / 2; d > 0; d /= 2) value += shuffle_xor(value, d);
  return value;
}

// Of several values at once, as an exchange takes its time.
template <class C, int N>
DCNV3_DEVICE void sum_of_lanes(C (&values)[N], int lanes) {
  for (int d = lanes / 2; d > 0; d /= 2) {
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] += shuffle_xor(values[i], d);
  }
}

// Two neighbours, with one load or store; aligned where V is not 1.
template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T first, second;
};

// -------------------------------------------------------------------------------------------------------------- units

template <class Index>
struct Unit {
  bool active;  // else a lane has nothing to do but takes part in the warp's exchanges
  Index number;  // in its image
  int group, x, y;
};

// Where an image begins in the input, and its units in the other tensors.
struct Origins {
  int64_t input, units;
  template <class C>
  DCNV3_DEVICE Origins(const Problem<C>& q, int64_t image)
      : input(image * (static_cast<int64_t>(q.height) * q.width * q.channels)),
        units(image * (static_cast<int64_t>(q.height_out) * q.width_out * q.groups)) {}
};

struct Tile {
  uint32_t image;
  int x, y;  // among its image's
};

template <class C>
DCNV3_DEVICE Tile tile_of(const Problem<C>& q, uint32_t number) {
  const uint32_t image = q.by_tiles_per_image(number);
  const uint32_t of_image = number - image * static_cast<uint32_t>(q.tiles_per_image);
  const int y = static_cast<int>(q.by_tiles_x(of_image));
  return {image, static_cast<int>(of_image) - y * q.tiles_x, y};
}

// Calls `work(origins, unit)` for all units of the block's tiles, the same number of times in all lanes of a warp.
template <class Index, class C, class Work>
DCNV3_DEVICE void for_units(const Problem<C>& q, int lanes, Work work) {
  constexpr bool wide = sizeof(Index) == 8;
  typedef std::conditional_t<wide, int64_t, uint32_t> Number;
  const unsigned units = 32u / static_cast<unsigned>(lanes), unit_of_warp = thread_number() % 32 / static_cast<unsigned>(lanes);
  const unsigned warp = thread_number() / 32, warps = block_size() / 32;
  const unsigned tile_units = static_cast<unsigned>(q.groups) << (q.tile_width_log2 + q.tile_height_log2);
  for (Number tile = block_number(); tile < static_cast<Number>(q.tiles); tile += grid_size()) {
    int64_t image;
    int tile_x, tile_y;
    if constexpr (wide) {
      image = tile / q.tiles_per_image;
      const int tile_of_image = static_cast<int>(tile - image * q.tiles_per_image);
      tile_y = tile_of_image / q.tiles_x, tile_x = tile_of_image - tile_y * q.tiles_x;
    } else {
      const Tile place = tile_of(q, tile);
      image = place.image, tile_x = place.x, tile_y = place.y;
    }
    const Origins origins(q, image);
    for (unsigned first = warp * units; first < tile_units; first += warps * units) {
      const unsigned unit_of_tile = first + unit_of_warp;
      const unsigned pixel = q.by_groups(unit_of_tile);
      Unit<Index> unit;
      unit.group = static_cast<int>(unit_of_tile - pixel * static_cast<unsigned>(q.groups));
      unit.x = (tile_x << q.tile_width_log2) + static_cast<int>(pixel & ((1u << q.tile_width_log2) - 1u));
      unit.y = (tile_y << q.tile_height_log2) + static_cast<int>(pixel >> q.tile_width_log2);
      unit.active = unit_of_tile < tile_units && unit.x < q.width_out && unit.y < q.height_out;
      if (!unit.active) unit.group = unit.x = unit.y = 0;
      unit.number = (static_cast<Index>(unit.y) * q.width_out + unit.x) * q.groups + unit.group;
      work(origins, unit);
    }
  }
}

// ------------------------------------------------------------------------------------------------------------- points

// How many of its unit's points a lane has at the most, where that is known when the kernel is compiled; else 1.
template <int LANES, int POINTS>
constexpr int own_points = LANES != 0 && POINTS != 0 ? (POINTS + LANES - 1) / LANES : 1;

// Calls `work(i)` for the points of a lane, of which the first is `member`: i = 0, lanes, 2 * lanes ...
template <int LANES, int POINTS, class Work>
DCNV3_DEVICE void for_own_points(int lanes, int points, int member, Work work) {
  if constexpr (LANES != 0 && POINTS != 0) {
#pragma unroll
    for (int i = 0; i < POINTS; i += LANES) {
      if (i + LANES <= POINTS || member + i < POINTS) work(i);
    }
  } else {
    for (int i = 0; i < points - member; i += lanes) work(i);
  }
}

// One coordinate of a point, which lies between the pixels `low` and `low + 1`. Each of them may lie in the image or not; a
// point must lie strictly inside (-1, size).
template <class C>
struct Axis {
  C position;  // from `start`
  int low;
  C fraction;
  int size;

  DCNV3_DEVICE Axis(C at, int start, int size) : position(at), size(size) {
    const int whole = floor_to_int(position);
    fraction = position - static_cast<C>(whole);
    low = static_cast<int>(static_cast<unsigned>(start) + static_cast<unsigned>(whole));
  }
  // Neither holds for a position that is not a number or that no int can hold.
  DCNV3_DEVICE bool has_both() const { return static_cast<unsigned>(low) < static_cast<unsigned>(size - 1) && fraction < C(1); }
  DCNV3_DEVICE bool is_countable() const { return fabs(position) < C(1 << 30); }
  // Without branches: & and | instead of && and ||.
  DCNV3_DEVICE bool has_low() const { return is_countable() & (static_cast<unsigned>(low) < static_cast<unsigned>(size)); }
  DCNV3_DEVICE bool has_high() const {
    return is_countable() & (static_cast<unsigned>(low) + 1u < static_cast<unsigned>(size)) & ((low >= 0) | (fraction > C(0)));
  }
};

template <class C>
struct Location {
  Axis<C> x, y;
  DCNV3_DEVICE bool has_all() const { return x.has_both() && y.has_both(); }
};

// `pair` is the offset.
template <int V, int POINTS, class T, class Index>
DCNV3_DEVICE Location<Compute<T>> locate(
    const Problem<Compute<T>>& q, const Unit<Index>& unit, int point, const T* pair) {
  typedef Compute<T> C;
  int column, row;
  if constexpr (POINTS != 0) {  // 3 x 3, or that without its centre
    const int cell = POINTS == 8 && point >= 4 ? point + 1 : point;
    column = cell / 3, row = cell - column * 3;
  } else {
    const int cell = point >= q.centre ? point + 1 : point;
    column = cell / q.kernel_h, row = cell - column * q.kernel_h;
  }
  C offset_x, offset_y;
  if constexpr (V == 1) {
    offset_x = widen(pair[0]), offset_y = widen(pair[1]);
  } else {
    const Pair<T> both = *reinterpret_cast<const Pair<T>*>(pair);
    offset_x = widen(both.first), offset_y = widen(both.second);
  }
  const C x = (static_cast<C>(column * q.dilation_w - q.half_w) + offset_x) * q.offset_scale;
  const C y = (static_cast<C>(row * q.dilation_h - q.half_h) + offset_y) * q.offset_scale;
  return {
      Axis<C>(x, unit.x * q.stride_w - q.padding_w + q.half_w, q.width),
      Axis<C>(y, unit.y * q.stride_h - q.padding_h + q.half_h, q.height)};
}

// The modulation of a lane's points. `mask` is that of its first point.
template <class T, int LANES, int POINTS>
struct Modulation {
  typedef Compute<T> C;
  static constexpr bool keeps = LANES != 0 && POINTS != 0;
  const T* mask;
  bool softmax;
  C largest, scale;
  C kept[own_points<LANES, POINTS>];

  DCNV3_DEVICE Modulation(const Problem<C>& q, int lanes, int points, int member, const T* own_mask)
      : mask(own_mask), softmax(q.softmax), largest(C(0)), scale(C(1)) {
    const auto for_own = [&](auto work) { for_own_points<LANES, POINTS>(lanes, points, member, work); };
    if constexpr (keeps) {
      for_own([&](int i) { kept[i / LANES] = widen(mask[i]); });
    }
    if (!softmax) return;
    largest = C(-INFINITY);
    for_own([&](int i) { largest = fmax(largest, logit(i)); });
    for (int d = lanes / 2; d > 0; d /= 2) largest = fmax(largest, shuffle_xor(largest, d));
    C sum = C(0);
    for_own([&](int i) {
      const C power = exponential(logit(i) - largest);
      if constexpr (keeps) kept[i / LANES] = power;
      sum += power;
    });
    scale = reciprocal(sum_of_lanes(sum, lanes));
  }

  DCNV3_DEVICE C operator()(int i) const {
    if constexpr (keeps) return kept[i / LANES] * scale;
    const C value = widen(mask[i]);
    return softmax ? exponential(value - largest) * scale : value;
  }

 private:
  DCNV3_DEVICE C logit(int i) const {
    if constexpr (keeps) return kept[i / LANES];
    return widen(mask[i]);
  }
};

// What the lanes of a unit tell each other of a point, in shared memory: its corners as numbers of bytes from the image's
// first, -1 outside; upper left, upper right, lower left, lower right.
template <class Number>
struct alignas(16) Four {
  Number of[4];
};
template <class C>
struct Fractions {
  C x, y;
};

template <class C, class Index>
struct Shared {
  Four<C>* weights;  // with the modulation
  Four<Index>* corners;
  Fractions<C>* fractions;  // backward

  // Of a warp, for so many points of all its units.
  static constexpr int64_t bytes(int64_t count, bool backward) {
    const int64_t point = sizeof(Four<C>) + sizeof(Four<Index>) + (backward ? sizeof(Fractions<C>) : 0);
    return (count * point + 15) / 16 * 16;  // the next warp's are aligned too
  }
  // The memory of this lane's unit: of point i at [i * units].
  DCNV3_DEVICE Shared(int lanes, int points, bool backward) {
    const int units = 32 / lanes, count = points * units, unit = static_cast<int>(thread_number()) % 32 / lanes;
    const int warp = static_cast<int>(thread_number() / 32);
    char* memory = static_cast<char*>(shared_memory()) + warp * static_cast<int>(bytes(count, backward));
    weights = reinterpret_cast<Four<C>*>(memory) + unit;
    corners = reinterpret_cast<Four<Index>*>(memory + count * sizeof(Four<C>)) + unit;
    fractions = reinterpret_cast<Fractions<C>*>(memory + count * (sizeof(Four<C>) + sizeof(Four<Index>))) + unit;
  }
};

template <class C>
DCNV3_DEVICE Four<C> weights_of(const Location<C>& at, C modulation) {
  const C bottom = modulation * at.y.fraction, top = modulation * (C(1) - at.y.fraction), left = C(1) - at.x.fraction;
  return {{top * left, top * at.x.fraction, bottom * left, bottom * at.x.fraction}};
}

// A corner outside has no weight either: it may be anything there.
template <class T, class C, class Index>
DCNV3_DEVICE Four<Index> corners_of(const Problem<C>& q, const Location<C>& at, int group, Four<C>& weights) {
  constexpr Index size = sizeof(T);
  const Index first = ((static_cast<Index>(at.y.low) * q.width + at.x.low) * q.channels +
                       static_cast<Index>(group) * q.group_channels) * size;
  const Index right = q.channels * size, below = q.width * right;
  Four<Index> corners{{first, first + right, first + below, first + right + below}};
  if (!at.has_all()) [[unlikely]] {
    const bool columns[2] = {at.x.has_low(), at.x.has_high()}, rows[2] = {at.y.has_low(), at.y.has_high()};
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      const bool inside = columns[corner % 2] & rows[corner / 2];
      corners.of[corner] = inside ? corners.of[corner] : -1;
      weights.of[corner] = inside ? weights.of[corner] : C(0);
    }
  }
  return corners;
}

// The channels of a corner; `image` is that of these channels.
template <class T, class Index>
DCNV3_DEVICE const T* at_corner(const T* image, Index corner) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(image) + static_cast<std::make_unsigned_t<Index>>(corner));
}

// ------------------------------------------------------------------------------------------------------------ forward

// Adds V channels of all points of a unit to `sum`; `image` is that of these channels. `has_all`: all corners are inside.
template <bool has_all, int V, int POINTS, class T, class C, class Index>
DCNV3_DEVICE void sum_points(const T* image, const Shared<C, Index>& shared, int points, int units, C (&sum)[V]) {
  [[maybe_unused]] constexpr int at_once = POINTS ? (POINTS + 2) / 3 : 1;
#pragma unroll at_once
  for (int i = 0; i < points; ++i) {
    const Four<Index> corners = shared.corners[i * units];
    const Four<C> weights = shared.weights[i * units];
    C values[4][V];
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      if constexpr (has_all) {
        load<V>(at_corner(image, corners.of[corner]), values[corner]);
      } else {
        load_if<V>(corners.of[corner] >= 0, at_corner(image, corners.of[corner]), values[corner]);
      }
    }
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] += weights.of[corner] * values[corner][v];
    }
  }
}

// LANES and POINTS are 0 where they are known at run time only. With LANES, D = LANES * V.
template <class T, int V, int LANES, int POINTS, class Index>
DCNV3_KERNEL(256, sizeof(T) == 8 ? 2 : sizeof(T) == 4 || sizeof(Index) == 8 ? 3 : 4) forward_kernel(
    const Problem<Compute<T>> q, const T* __restrict__ input, const T* __restrict__ offset, const T* __restrict__ mask,
    T* __restrict__ output) {
  typedef Compute<T> C;
  const int lanes = LANES ? LANES : q.lanes, points = POINTS ? POINTS : q.points, units = 32 / lanes;
  const int channels = LANES ? LANES * V : q.group_channels;
  const int member = static_cast<int>(thread_number()) % lanes;
  const Shared<C, Index> shared(lanes, points, false);

  for_units<Index>(q, lanes, [&](const Origins& origins, const Unit<Index>& unit) {
    // of the lane's first point
    const T* own_offset = offset + origins.units * points * 2 + (unit.number * points + member) * 2;
    const T* own_mask = mask + origins.units * points + (unit.number * points + member);
    // On their way while the softmax is computed, where registers last.
    constexpr bool early = LANES != 0 && (LANES == 2 || sizeof(T) == 4);
    [[maybe_unused]] Pair<T> offsets[own_points<LANES, POINTS>];
    if constexpr (early) {
      for_own_points<LANES, POINTS>(lanes, points, member, [&](int i) {
        offsets[i / LANES] = *reinterpret_cast<const Pair<T>*>(own_offset + 2 * i);
      });
    }
    const Modulation<T, LANES, POINTS> modulation(q, lanes, points, member, own_mask);
    bool has_all = true;
    for_own_points<LANES, POINTS>(lanes, points, member, [&](int i) {
      const T* pair = own_offset + 2 * i;
      if constexpr (early) pair = &offsets[i / LANES].first;
      const auto at = locate<V, POINTS>(q, unit, member + i, pair);
      has_all = has_all && at.has_all();
      Four<C> weights = weights_of(at, modulation(i));
      shared.corners[(member + i) * units] = corners_of<T, C, Index>(q, at, unit.group, weights);
      shared.weights[(member + i) * units] = weights;
    });
    has_all = all_lanes(has_all);  // and what they wrote to shared memory is seen by all
    if (unit.active) {
      for (int channel = member * V; channel < channels; channel += lanes * V) {
        const T* from = input + origins.input + channel;
        C sum[V] = {};
        if (POINTS != 0 && has_all) {
          sum_points<true, V, POINTS>(from, shared, points, units, sum);
        } else {
          sum_points<false, V, POINTS>(from, shared, points, units, sum);
        }
        store<V>(sum, output + origins.units * channels + (unit.number * channels + channel));
      }
    }
    sync_warp();
  });
}

// ----------------------------------------------------------------------------------------------------------- backward

// Sums of floating-point numbers, in whatever order they come.
template <class C>
struct FloatingSums {
  C* sums;

  DCNV3_DEVICE const FloatingSums& adder() const { return *this; }

  template <int V>
  DCNV3_DEVICE void operator()(int64_t at, C weight, const C (&values)[V]) const {
    C products[V];
#pragma unroll
    for (int v = 0; v < V; ++v) products[v] = weight * values[v];
    if constexpr (V % 4 == 0 && sizeof(C) == 4) {
#pragma unroll
      for (int v = 0; v < V; v += 4) atomic_add_4(sums + at + v, products + v);
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) atomic_add(sums + at + v, products[v]);
    }
  }
};

// e such that a finite number of these bits is less than 2^e.
DCNV3_DEVICE int exponent_of_double(uint64_t bits) { return static_cast<int>((bits >> 52) & 0x7ff) - 1022; }

// Multiples of a power of two, so chosen that the largest possible sum is below 2^62 of them; no order makes a difference.
template <class C>
struct FixedPointSums {
  unsigned long long* sums;
  unsigned* not_finite;
  const unsigned long long* largest;  // bits, as double, of the largest of grad_output and of the mask
  int64_t terms;                      // that one sum can have
  bool softmax;

  DCNV3_DEVICE int exponent() const {
    int bits_of_terms = 0;
    while (bits_of_terms < 62 && (terms >> bits_of_terms) != 0) ++bits_of_terms;
    const int largest_exponent = sizeof(C) == 4 ? 129 : 1025;  // products above are not finite
    const int exponent = exponent_of_double(largest[0]) + (softmax ? 1 : exponent_of_double(largest[1]));
    const int wanted = 62 - (exponent < largest_exponent ? exponent : largest_exponent) - bits_of_terms;
    const int most = sizeof(C) == 4 ? 126 : 1022;  // 2^-e is a normal number
    return wanted < most ? wanted : most;
  }
  DCNV3_DEVICE C power_of_two(int e) const {
    if constexpr (sizeof(C) == 4) {
      return float_of_bits(static_cast<uint32_t>(e + 127) << 23);
    } else {
      return double_of_bits(0u, static_cast<uint32_t>(e + 1023) << 20);
    }
  }

  struct Adder {
    unsigned long long* sums;
    unsigned* not_finite;
    C scale;

    template <int V>
    DCNV3_DEVICE void operator()(int64_t at, C weight, const C (&values)[V]) const {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const C product = weight * values[v];
        if (product - product == C(0)) {
          atomic_add(sums + at + v, static_cast<unsigned long long>(nearest_integer(product * scale)));
        } else {
          atomic_or(not_finite + (at + v) / 32, 1u << ((at + v) % 32));
        }
      }
    }
  };
  DCNV3_DEVICE Adder adder() const { return {sums, not_finite, power_of_two(exponent())}; }
};

// Of a point: what grad_output times its bilinear sample is, and how it changes with the point's place. `products`: grad_output
// times each corner.
template <class C>
struct Sample {
  C value, change_x, change_y;

  DCNV3_DEVICE Sample(const C (&products)[4], Fractions<C> fraction) {
    const C left = C(1) - fraction.x, top = C(1) - fraction.y;
    const C upper = left * products[0] + fraction.x * products[1];
    const C lower = left * products[2] + fraction.x * products[3];
    value = top * upper + fraction.y * lower;
    change_x = top * (products[1] - products[0]) + fraction.y * (products[3] - products[2]);
    change_y = lower - upper;
  }
};

// Whether any of a point's corners is in the image; else its fractions may be no numbers.
template <class Index>
DCNV3_DEVICE bool has_any(const Four<Index>& corners) {
  return (corners.of[0] & corners.of[1] & corners.of[2] & corners.of[3]) >= 0;
}

// For any call. S: where the gradient of the input goes.
template <class T, int V, class Index, class S>
DCNV3_KERNEL(256, 2) backward_kernel(
    const Problem<Compute<T>> q, const T* __restrict__ grad_output, const T* __restrict__ input, const T* __restrict__ offset,
    const T* __restrict__ mask, const S grad_input, T* __restrict__ grad_offset, T* __restrict__ grad_mask) {
  typedef Compute<T> C;
  const int lanes = q.lanes, points = q.points, units = 32 / lanes, channels = q.group_channels;
  const int member = static_cast<int>(thread_number()) % lanes;
  const Shared<C, Index> shared(lanes, points, true);
  const auto add = grad_input.adder();

  for_units<Index>(q, lanes, [&](const Origins& origins, const Unit<Index>& unit) {
    // of the lane's first point
    const int64_t at_mask = origins.units * points + (unit.number * points + member);
    const T* own_offset = offset + at_mask * 2;
    T* own_grad_offset = grad_offset + at_mask * 2;
    T* own_grad_mask = grad_mask + at_mask;
    const Modulation<T, 0, 0> modulation(q, lanes, points, member, mask + at_mask);
    for_own_points<0, 0>(lanes, points, member, [&](int i) {
      const auto at = locate<V, 0>(q, unit, member + i, own_offset + 2 * i);
      Four<C> weights = weights_of(at, modulation(i));
      shared.corners[(member + i) * units] = corners_of<T, C, Index>(q, at, unit.group, weights);
      shared.weights[(member + i) * units] = weights;
      shared.fractions[(member + i) * units] = {at.x.fraction, at.y.fraction};
    });
    sync_warp();

    // The points' samples go where their weights were.
    const T* grad = grad_output + origins.units * channels + unit.number * channels;
    for (int i = 0; i < points; ++i) {
      C products[4] = {};
      if (unit.active) {
        const Four<Index> corners = shared.corners[i * units];
        const Four<C> weights = shared.weights[i * units];
        for (int channel = member * V; channel < channels; channel += lanes * V) {
          C grads[V];
          load<V>(grad + channel, grads);
          const T* from = input + origins.input + channel;
#pragma unroll
          for (int corner = 0; corner < 4; ++corner) {
            if (corners.of[corner] < 0) continue;
            C values[V];
            load<V>(at_corner(from, corners.of[corner]), values);
#pragma unroll
            for (int v = 0; v < V; ++v) products[corner] += grads[v] * values[v];
            const Index element = corners.of[corner] / static_cast<Index>(sizeof(T));
            add.template operator()<V>(origins.input + channel + element, weights.of[corner], grads);
          }
        }
      }
      Sample<C> sample(products, shared.fractions[i * units]);
      sample.value = sum_of_lanes(sample.value, lanes);
      sample.change_x = sum_of_lanes(sample.change_x, lanes);
      sample.change_y = sum_of_lanes(sample.change_y, lanes);
      sync_warp();
      if (member == 0) shared.weights[i * units] = {{sample.value, sample.change_x, sample.change_y, C(0)}};
    }
    sync_warp();

    // From here to the next unit a lane reads and writes its own points alone.
    C dot = C(0);
    for_own_points<0, 0>(lanes, points, member, [&](int i) {
      Four<C>& sample = shared.weights[(member + i) * units];
      const bool inside = has_any(shared.corners[(member + i) * units]);
      const C grad_modulation = inside ? sample.of[0] : C(0);
      const C scaled = modulation(i) * q.offset_scale;
      if (unit.active) {
        narrow(inside ? scaled * sample.of[1] : C(0), own_grad_offset + 2 * i);
        narrow(inside ? scaled * sample.of[2] : C(0), own_grad_offset + 2 * i + 1);
        if (!q.softmax) narrow(grad_modulation, own_grad_mask + i);
      }
      sample.of[0] = grad_modulation;
      dot += modulation(i) * grad_modulation;
    });
    if (q.softmax) {
      dot = sum_of_lanes(dot, lanes);
      for_own_points<0, 0>(lanes, points, member, [&](int i) {
        const C grad_logit = modulation(i) * (shared.weights[(member + i) * units].of[0] - dot);
        if (unit.active) narrow(grad_logit, own_grad_mask + i);
      });
    }
  });
}

// A window is a tile of output pixels, where their kernels' centres lie in the input, and so many pixels around it. Behind its
// cells are eight more, for what is not in it: one for each corner of a point that is in the image, and one for each that is
// outside. So all are added up alike, and no two lanes write the same memory.
constexpr int window_margin = 3;
// How many units' points are worked out together, as the exchange between lanes takes its time: 16 lanes work out a unit's.
constexpr int window_rounds = 4;

// What a worker's lanes tell each other of one corner of a point.
struct alignas(16) WindowCorner {
  int32_t at;    // as in `Shared`, but 0 outside the image
  int32_t cell;  // in bytes
  float weight;
  float product;  // grad_output times the corner
};

constexpr int window_bytes(int cells, int group_channels, int points) {
  return (cells + 8) * group_channels * static_cast<int>(sizeof(float)) +
      window_rounds * group_channels / 16 * 4 * points * static_cast<int>(sizeof(WindowCorner));
}

// For 3 x 3 kernels without stride and dilation, and D of 16 or 32. A worker is D lanes: D / 4 for each of the four corners of
// a point, 4 channels each. It alone writes its window, whose sums therefore come in one order. Blocks are of one warp, which
// has all the registers that it wants, as shared memory holds few of them.
template <class T, int D, int POINTS, class S>
DCNV3_KERNEL(32, 1) window_backward_kernel(
    const Problem<float> q, const T* __restrict__ grad_output, const T* __restrict__ input, const T* __restrict__ offset,
    const T* __restrict__ mask, const S grad_input, T* __restrict__ grad_offset, T* __restrict__ grad_mask) {
  static_assert(sizeof(Compute<T>) == 4 && POINTS <= 16);
  constexpr int workers = 32 / D, quads = D / 4, at_once = D / 16, all_units = window_rounds * at_once;
  constexpr int cell_bytes = D * static_cast<int>(sizeof(float));
  const int member = static_cast<int>(thread_number()) % D, worker = static_cast<int>(thread_number()) / D;
  const int corner = member / quads, channel = member % quads * 4;
  const bool has_point = member % 16 < POINTS;
  const int point = has_point ? member % 16 : 0, first_unit = member / 16;
  const auto add = grad_input.adder();

  const int width = q.tile_width + 2 * window_margin, height = q.tile_height + 2 * window_margin, cells = width * height;
  char* memory = static_cast<char*>(shared_memory()) + worker * window_bytes(cells, D, POINTS);
  char* window = memory + channel * sizeof(float);
  WindowCorner* corners = reinterpret_cast<WindowCorner*>(memory + (cells + 8) * cell_bytes);  // [unit, corner, point]
  const auto sums_of = [&](int cell) -> Four<float>& { return *reinterpret_cast<Four<float>*>(window + cell); };
  for (int cell = corner; cell < cells + 8; cell += 4) sums_of(cell * cell_bytes) = {};

  // The groups of a tile are neighbours.
  const int64_t task = static_cast<int64_t>(block_number()) * workers + worker;
  const bool active = task < q.tiles * q.groups;
  const uint32_t number = active ? static_cast<uint32_t>(task) : 0u;
  const uint32_t tile_number = q.by_groups(number);
  const int group = static_cast<int>(number - tile_number * static_cast<uint32_t>(q.groups));
  const Tile tile = tile_of(q, tile_number);
  const int first_x = tile.x * q.tile_width, first_y = tile.y * q.tile_height;
  const int window_x = first_x + 1 - q.padding_w - window_margin, window_y = first_y + 1 - q.padding_h - window_margin;
  const int pixels = active ? q.tile_width * q.tile_height : 0;
  const auto unit_of = [&](int pixel) {
    const int row = static_cast<int>(q.by_tile_width(static_cast<uint32_t>(pixel)));
    Unit<int32_t> unit{false, 0, group, first_x + pixel - row * q.tile_width, first_y + row};
    unit.active = pixel < pixels && unit.x < q.width_out && unit.y < q.height_out;
    if (unit.active) unit.number = (unit.y * q.width_out + unit.x) * q.groups + group;
    return unit;
  };

  // of these channels, and of this lane's point
  const Origins origins(q, tile.image);
  const T* values_of_image = input + origins.input + channel;
  const T* own_grad_output = grad_output + origins.units * D + channel;
  const int64_t at_point = origins.units * POINTS + point;
  const T* own_mask = mask + at_point;
  const Pair<T>* own_offset = reinterpret_cast<const Pair<T>*>(offset) + at_point;
  T* own_grad_mask = grad_mask + at_point;
  Pair<T>* own_grad_offset = reinterpret_cast<Pair<T>*>(grad_offset) + at_point;

  for (int first = 0; first < q.tile_width * q.tile_height; first += all_units) {
    Unit<int32_t> unit[window_rounds];
    Pair<T> offsets[window_rounds];
    float modulation[window_rounds], largest[window_rounds], sum[window_rounds];
#pragma unroll
    for (int r = 0; r < window_rounds; ++r) {
      unit[r] = unit_of(first + r * at_once + first_unit);
      modulation[r] = widen(own_mask[unit[r].number * POINTS]);
      offsets[r] = own_offset[unit[r].number * POINTS];
      largest[r] = modulation[r];
    }
    if (q.softmax) {
      for (int d = 8; d > 0; d /= 2) {
#pragma unroll
        for (int r = 0; r < window_rounds; ++r) largest[r] = fmax(largest[r], shuffle_xor(largest[r], d));
      }
#pragma unroll
      for (int r = 0; r < window_rounds; ++r) {
        modulation[r] = exponential(modulation[r] - largest[r]);
        sum[r] = has_point ? modulation[r] : 0.0f;
      }
      sum_of_lanes(sum, 16);
#pragma unroll
      for (int r = 0; r < window_rounds; ++r) modulation[r] *= reciprocal(sum[r]);
    }
    Fractions<float> fraction[window_rounds];
    int inside[window_rounds];  // a bit for each corner
    bool all_in_window = true;
#pragma unroll
    for (int r = 0; r < window_rounds; ++r) {
      const auto at = locate<4, POINTS>(q, unit[r], point, &offsets[r].first);
      Four<float> weights = weights_of(at, modulation[r]);
      fraction[r] = {at.x.fraction, at.y.fraction};
      inside[r] = 15;
      const unsigned x = static_cast<unsigned>(at.x.low) - static_cast<unsigned>(window_x);
      const unsigned y = static_cast<unsigned>(at.y.low) - static_cast<unsigned>(window_y);
      const unsigned cell = y * static_cast<unsigned>(width) + x, below = cell + static_cast<unsigned>(width);
      Four<int32_t> places = corners_of<T, float, int32_t>(q, at, group, weights);
      Four<unsigned> in_window{{cell, cell + 1, below, below + 1}};
      const bool in_whole = x < static_cast<unsigned>(width - 1) && y < static_cast<unsigned>(height - 1);
      if (!unit[r].active || !at.has_all() || !in_whole) [[unlikely]] {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          if (!unit[r].active || places.of[c] < 0) {
            places.of[c] = 0, in_window.of[c] = static_cast<unsigned>(cells + 4 + c), inside[r] &= ~(1 << c);
          } else if (x + c % 2 >= static_cast<unsigned>(width) || y + c / 2 >= static_cast<unsigned>(height)) {
            in_window.of[c] = static_cast<unsigned>(cells + c), all_in_window = false;
          }
        }
      }
      if (!has_point) continue;
      WindowCorner* own = corners + ((r * at_once + first_unit) * 4 * POINTS + point);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        own[c * POINTS] = {places.of[c], static_cast<int32_t>(in_window.of[c] * cell_bytes), weights.of[c], 0.0f};
      }
    }
    all_in_window = all_lanes(all_in_window);  // and what they wrote to shared memory is seen by all

    // Now each lane takes one corner of all points, some channels of it.
#pragma unroll 1
    for (int u = 0; u < all_units; ++u) {
      WindowCorner* own = corners + (u * 4 + corner) * POINTS;
      const Unit<int32_t> own_unit = unit_of(first + u);
      float grads[4] = {};
      if (own_unit.active) load<4>(own_grad_output + own_unit.number * D, grads);
      // All loads, then all exchanges, then the sums, each of which waits for the one before.
      WindowCorner at[POINTS];
      float values[POINTS][4], products[POINTS];
#pragma unroll
      for (int i = 0; i < POINTS; ++i) {
        at[i] = own[i];
        load<4>(at_corner(values_of_image, at[i].at), values[i]);
      }
#pragma unroll
      for (int i = 0; i < POINTS; ++i) {
        products[i] = grads[0] * values[i][0];
#pragma unroll
        for (int v = 1; v < 4; ++v) products[i] += grads[v] * values[i][v];
      }
      sum_of_lanes(products, quads);
      sync_warp();  // all have read their corners
      if (channel == 0) {
#pragma unroll
        for (int i = 0; i < POINTS; ++i) own[i].product = products[i];
      }
#pragma unroll
      for (int i = 0; i < POINTS; ++i) {
        Four<float> sums = sums_of(at[i].cell);
#pragma unroll
        for (int v = 0; v < 4; ++v) sums.of[v] += at[i].weight * grads[v];
        sums_of(at[i].cell) = sums;
        sync_warp();
      }
      if (!all_in_window) {
#pragma unroll
        for (int i = 0; i < POINTS; ++i) {
          if (at[i].cell == (cells + corner) * cell_bytes) {
            add.template operator()<4>(
                origins.input + channel + at[i].at / static_cast<int>(sizeof(T)), at[i].weight, grads);
          }
        }
      }
    }

    // And a point again: its products were written before the last of those waits.
#pragma unroll
    for (int r = 0; r < window_rounds; ++r) {
      const WindowCorner* own = corners + ((r * at_once + first_unit) * 4 * POINTS + point);
      float products[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) products[c] = (inside[r] >> c & 1) != 0 ? own[c * POINTS].product : 0.0f;
      const Sample<float> sample(products, fraction[r]);
      const float grad_modulation = inside[r] != 0 ? sample.value : 0.0f, scaled = modulation[r] * q.offset_scale;
      float grad_of_mask = grad_modulation;
      if (q.softmax) {
        const float dot = sum_of_lanes(has_point ? modulation[r] * grad_modulation : 0.0f, 16);
        grad_of_mask = modulation[r] * (grad_modulation - dot);
      }
      if (unit[r].active && has_point) {
        Pair<T> pair;
        narrow(inside[r] != 0 ? scaled * sample.change_x : 0.0f, &pair.first);
        narrow(inside[r] != 0 ? scaled * sample.change_y : 0.0f, &pair.second);
        own_grad_offset[unit[r].number * POINTS] = pair;
        narrow(grad_of_mask, own_grad_mask + unit[r].number * POINTS);
      }
    }
    sync_warp();
  }

  for (int y = 0; y < height; ++y) {
    for (int x = corner; x < width; x += 4) {
      const Four<float> sums = sums_of((y * width + x) * cell_bytes);
      if (sums.of[0] != 0.0f || sums.of[1] != 0.0f || sums.of[2] != 0.0f || sums.of[3] != 0.0f) {
        const int element = ((window_y + y) * q.width + window_x + x) * q.channels + group * D + channel;
        add.template operator()<4>(origins.input + element, 1.0f, sums.of);
      }
    }
  }
}

// The bits, as double, of the largest finite absolute value.
template <class T>
DCNV3_KERNEL(256, 4) largest_kernel(const T* __restrict__ values, int64_t count, unsigned long long* result) {
  typedef Compute<T> C;
  C largest = C(0);
  for (int64_t i = static_cast<int64_t>(block_number()) * block_size() + thread_number(); i < count;
       i += static_cast<int64_t>(grid_size()) * block_size()) {
    const C value = fabs(widen(values[i]));
    if (value - value == C(0)) largest = fmax(largest, value);
  }
  for (int d = 16; d > 0; d /= 2) largest = fmax(largest, shuffle_xor(largest, d));
  if (thread_number() % 32 == 0) atomic_max(result, bits_of_double(static_cast<double>(largest)));
}

template <class T>
DCNV3_KERNEL(256, 4) fixed_point_to_floating_kernel(FixedPointSums<Compute<T>> from, int64_t count, T* __restrict__ to) {
  typedef Compute<T> C;
  const int exponent = -from.exponent();
  for (int64_t i = static_cast<int64_t>(block_number()) * block_size() + thread_number(); i < count;
       i += static_cast<int64_t>(grid_size()) * block_size()) {
    const bool finite = (from.not_finite[i / 32] >> (i % 32) & 1u) == 0;
    const double value = ldexp(static_cast<double>(static_cast<long long>(from.sums[i])), exponent);
    narrow(finite ? static_cast<C>(value) : C(NAN), to + i);
  }
}

// --------------------------------------------------------------------------------------------------------------- host

constexpr int shared_limit = 48 * 1024;

template <class C>
struct Plan {
  Problem<C> problem;
  int vector;  // channels per lane: 1, or 16 bytes of them, backward of the sums
  bool wide;   // 64-bit numbers of the elements of an image
  bool small_kernel;  // 3 x 3
  bool windows;  // for `window_backward_kernel`
  unsigned grid, block, shared_bytes;
  const char* error;
};

inline int log2_ceil(int64_t value) {
  int log2 = 0;
  while ((int64_t(1) << log2) < value) ++log2;
  return log2;
}

// False if an image has more than an int can count.
template <class C>
bool set_tiles(const Shape& s, int64_t tiles_x, int64_t tiles_y, Problem<C>& q) {
  if (tiles_x * tiles_y > INT32_MAX) return false;
  q.tiles_x = static_cast<int>(tiles_x), q.tiles_per_image = static_cast<int>(tiles_x * tiles_y);
  q.tiles = s.batch * q.tiles_per_image;
  q.by_tiles_per_image = Divisor(static_cast<uint32_t>(q.tiles_per_image));
  q.by_tiles_x = Divisor(static_cast<uint32_t>(q.tiles_x));
  return true;
}

// Lays a call out for `window_backward_kernel`, in tiles as large as it allows that all multiprocessors get several; false if
// there are too many of them.
template <class C>
bool plan_windows(const Shape& s, int multiprocessors, Plan<C>& plan) {
  Problem<C>& q = plan.problem;
  const int64_t workers = 32 / s.group_channels;
  int most_wide = 8, most_high = 8;
  const auto tiles = [](int64_t size, int most) { return (size + most - 1) / most; };
  const auto all_tiles = [&] { return s.batch * tiles(s.height_out, most_high) * tiles(s.width_out, most_wide); };
  while (all_tiles() * s.groups < 4 * workers * multiprocessors && most_wide > 2) {
    if (most_high >= most_wide) {
      most_high /= 2;
    } else {
      most_wide /= 2;
    }
  }
  // as many tiles, of one size
  const auto balanced = [&](int64_t size, int most) {
    return static_cast<int>(tiles(size, static_cast<int>(tiles(size, most))));
  };
  q.tile_width = balanced(s.width_out, most_wide), q.tile_height = balanced(s.height_out, most_high);
  q.by_tile_width = Divisor(static_cast<uint32_t>(q.tile_width));
  const int64_t tiles_x = tiles(s.width_out, q.tile_width), tiles_y = tiles(s.height_out, q.tile_height);
  if (!set_tiles(s, tiles_x, tiles_y, q) || q.tiles * s.groups > INT32_MAX) return false;
  plan.grid = static_cast<unsigned>((q.tiles * s.groups + workers - 1) / workers);
  plan.block = 32;
  const int cells = (q.tile_width + 2 * window_margin) * (q.tile_height + 2 * window_margin);
  plan.shared_bytes = static_cast<unsigned>(workers * window_bytes(cells, q.group_channels, q.points));
  return plan.windows = true;
}

// How a call is laid out on a device, in a type T of its tensors. `aligned`: 16 bytes of them can be loaded at once.
template <class T>
Plan<Compute<T>> plan_call(const Shape& s, bool backward, bool aligned, int multiprocessors) {
  typedef Compute<T> C;
  Plan<C> plan{};
  Problem<C>& q = plan.problem;
  const int64_t limit = int64_t(1) << 29;
  if (s.height + 2 * s.padding_h > limit || s.width + 2 * s.padding_w > limit || s.channels > limit ||
      s.points > limit || s.dilation_h > limit || s.dilation_w > limit || s.stride_h > limit || s.stride_w > limit) {
    plan.error = "a height, width, number of channels or hyper-parameter above 2^29";
    return plan;
  }
  q.points = static_cast<int>(s.points);
  q.height = static_cast<int>(s.height), q.width = static_cast<int>(s.width);
  q.height_out = static_cast<int>(s.height_out), q.width_out = static_cast<int>(s.width_out);
  q.channels = static_cast<int>(s.channels), q.groups = static_cast<int>(s.groups);
  q.group_channels = static_cast<int>(s.group_channels);
  q.kernel_h = static_cast<int>(s.kernel_h);
  q.stride_h = static_cast<int>(s.stride_h), q.stride_w = static_cast<int>(s.stride_w);
  q.padding_h = static_cast<int>(s.padding_h), q.padding_w = static_cast<int>(s.padding_w);
  q.dilation_h = static_cast<int>(s.dilation_h), q.dilation_w = static_cast<int>(s.dilation_w);
  q.centre = s.remove_center ? q.points / 2 : q.points;
  q.half_h = static_cast<int>(s.dilation_h * (s.kernel_h - 1) / 2);
  q.half_w = static_cast<int>(s.dilation_w * (s.kernel_w - 1) / 2);
  q.offset_scale = static_cast<C>(s.offset_scale);
  q.softmax = s.softmax;

  const int full = backward ? 16 / sizeof(C) : 16 / sizeof(T);
  const int64_t pixels_out = s.height_out * s.width_out;
  plan.wide = s.height * s.width * s.channels * static_cast<int64_t>(sizeof(T)) > INT32_MAX ||
      s.batch * pixels_out > INT32_MAX || pixels_out * s.channels > INT32_MAX ||
      pixels_out * s.groups * s.points * 2 > INT32_MAX;
  plan.vector = aligned && !plan.wide && s.group_channels % full == 0 ? full : 1;
  plan.small_kernel = s.kernel_h == 3 && s.kernel_w == 3;
  q.by_groups = Divisor(static_cast<uint32_t>(q.groups));
  const bool is_close = plan.small_kernel && s.stride_h == 1 && s.stride_w == 1 && s.dilation_h == 1 && s.dilation_w == 1;
  if (backward && plan.vector == 4 && is_close && (s.group_channels == 16 || s.group_channels == 32) &&
      plan_windows(s, multiprocessors, plan)) {
    return plan;
  }

  q.lanes = 1 << log2_ceil((s.group_channels + plan.vector - 1) / plan.vector);
  if (q.lanes > 32) q.lanes = 32;

  // A warp's shared memory holds the points of its units.
  int warps = 8;
  const auto shared = [&] {
    const int64_t count = s.points * (32 / q.lanes);
    return warps * (plan.wide ? Shared<C, int64_t>::bytes(count, backward) : Shared<C, int32_t>::bytes(count, backward));
  };
  while (warps > 1 && shared() > shared_limit) warps /= 2;
  while (q.lanes < 32 && shared() > shared_limit) q.lanes *= 2;
  if (shared() > shared_limit) {
    plan.error = "a kernel of so many points";
    return plan;
  }

  // Tiles as large as the work allows that all multiprocessors get several.
  const int units = 32 / q.lanes;
  int width_log2 = 3, height_log2 = 3;
  const auto tiles = [&](int64_t size, int log2) { return (size + (int64_t(1) << log2) - 1) >> log2; };
  const auto all_tiles = [&] { return s.batch * tiles(s.height_out, height_log2) * tiles(s.width_out, width_log2); };
  const auto is_too_large = [&] {
    const int64_t tile = s.groups << (width_log2 + height_log2);
    if (tile > 4 * warps * units || all_tiles() < 4 * multiprocessors) return true;
    return !backward && s.group_channels <= 16 && tile > warps * units && all_tiles() < 8 * multiprocessors;
  };
  while (width_log2 + height_log2 > 0 && is_too_large()) {
    if (height_log2 >= width_log2) {
      --height_log2;
    } else {
      --width_log2;
    }
  }
  while (warps > 1 && (s.groups << (width_log2 + height_log2)) <= warps / 2 * units) warps /= 2;
  q.tile_width_log2 = width_log2, q.tile_height_log2 = height_log2;
  if (!set_tiles(s, tiles(s.width_out, width_log2), tiles(s.height_out, height_log2), q)) {
    plan.error = "an output of so many pixels";
    return plan;
  }
  plan.grid = static_cast<unsigned>(q.tiles < INT32_MAX ? q.tiles : INT32_MAX);
  plan.block = static_cast<unsigned>(32 * warps);
  plan.shared_bytes = static_cast<unsigned>(shared());
  return plan;
}

inline bool is_aligned(const void* pointer, size_t bytes = 16) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// Calls `run` with a value of the type that stands for the dtype.
template <class Run>
const char* with_type(Dtype dtype, Run run) {
  switch (dtype) {
    case Dtype::float32:
      return run(float());
    case Dtype::float64:
      return run(double());
    case Dtype::float16:
      return run(Half());
    default:
      return run(BFloat16());
  }
}

template <int N>
struct Constant {
  static constexpr int value = N;
};

// Calls `run(group_channels, points)`, constants, for 16 or 32 channels and 9 or 8 points.
template <class C, class Run>
void with_main_shape(const Problem<C>& q, Run run) {
  if (q.group_channels == 16) {
    if (q.points == 9) return run(Constant<16>(), Constant<9>());
    return run(Constant<16>(), Constant<8>());
  }
  if (q.points == 9) return run(Constant<32>(), Constant<9>());
  run(Constant<32>(), Constant<8>());
}

// Calls `run(vector, index)`, a constant and one of the index' type.
template <int full, class C, class Run>
void with_vector(const Plan<C>& plan, Run run) {
  if (plan.wide) return run(Constant<1>(), int64_t());
  if (plan.vector == full) return run(Constant<full>(), int32_t());
  run(Constant<1>(), int32_t());
}

inline const char* launch_error() {
#if defined(DCNV3_EMULATION)
  return nullptr;
#elif DCNV3_HIP
  const hipError_t error = hipGetLastError();
  return error == hipSuccess ? nullptr : hipGetErrorString(error);
#else
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#endif
}

}  // namespace dcnv3
