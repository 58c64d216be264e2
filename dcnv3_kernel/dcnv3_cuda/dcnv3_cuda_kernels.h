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
  int lanes, points;
  int height, width, height_out, width_out, channels, groups, group_channels;
  int kernel_h, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  int centre;  // the number of the point that is left out, else that of no point
  C grid_x, grid_y, offset_scale;  // of the first point without offset, but for the pixel: see `locate`
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

DCNV3_DEVICE void unpack(const uint32_t (&words)[4], const float*, float* to) {
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = float_of_bits(words[i]);
}
DCNV3_DEVICE void unpack(const uint32_t (&words)[4], const double*, double* to) {
  to[0] = double_of_bits(words[0], words[1]);
  to[1] = double_of_bits(words[2], words[3]);
}
DCNV3_DEVICE void unpack(const uint32_t (&words)[4], const BFloat16*, float* to) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    to[2 * i] = float_of_bits(words[i] << 16);
    to[2 * i + 1] = float_of_bits(words[i] & 0xffff0000u);
  }
}
DCNV3_DEVICE void unpack(const uint32_t (&words)[4], const Half*, float* to) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    to[2 * i] = float_of_half(static_cast<uint16_t>(words[i]));
    to[2 * i + 1] = float_of_half(static_cast<uint16_t>(words[i] >> 16));
  }
}

// V neighbouring channels: one, or 16 bytes of them.
template <int V, class T>
DCNV3_DEVICE void load(const T* from, Compute<T> (&to)[V]) {
  if constexpr (V == 1) {
    to[0] = widen(*from);
  } else {
    static_assert(V * sizeof(T) == 16);
    const uint4 loaded = load_16_bytes(from);
    const uint32_t words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
    unpack(words, from, to);
  }
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

// Calls `work(origins, unit)` for all units of the block's tiles, the same number of times in all lanes of a warp.
template <class Index, class C, class Work>
DCNV3_DEVICE void for_units(const Problem<C>& q, int lanes, Work work) {
  constexpr bool wide = sizeof(Index) == 8;
  typedef std::conditional_t<wide, int64_t, uint32_t> Tile;
  const unsigned units = 32u / static_cast<unsigned>(lanes), unit_of_warp = thread_number() % 32 / static_cast<unsigned>(lanes);
  const unsigned warp = thread_number() / 32, warps = block_size() / 32;
  const unsigned tile_units = static_cast<unsigned>(q.groups) << (q.tile_width_log2 + q.tile_height_log2);
  for (Tile tile = block_number(); tile < static_cast<Tile>(q.tiles); tile += grid_size()) {
    int64_t image;
    int tile_x, tile_y;
    if constexpr (wide) {
      image = tile / q.tiles_per_image;
      const int tile_of_image = static_cast<int>(tile - image * q.tiles_per_image);
      tile_y = tile_of_image / q.tiles_x, tile_x = tile_of_image - tile_y * q.tiles_x;
    } else {
      const uint32_t image_of_tile = q.by_tiles_per_image(tile);
      const uint32_t tile_of_image = tile - image_of_tile * static_cast<uint32_t>(q.tiles_per_image);
      tile_y = static_cast<int>(q.by_tiles_x(tile_of_image));
      tile_x = static_cast<int>(tile_of_image) - tile_y * q.tiles_x;
      image = image_of_tile;
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
  DCNV3_DEVICE bool has_low() const { return is_countable() && low >= 0 && low < size; }
  DCNV3_DEVICE bool has_high() const {
    return is_countable() && low >= -1 && low < size - 1 && (low >= 0 || fraction > C(0));
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
  const C x = q.grid_x + (static_cast<C>(column * q.dilation_w) + offset_x) * q.offset_scale;
  const C y = q.grid_y + (static_cast<C>(row * q.dilation_h) + offset_y) * q.offset_scale;
  return {
      Axis<C>(x, unit.x * q.stride_w - q.padding_w, q.width), Axis<C>(y, unit.y * q.stride_h - q.padding_h, q.height)};
}

// The modulation of a lane's points. `mask` is that of its first point.
template <class T, int LANES, int POINTS>
struct Modulation {
  typedef Compute<T> C;
  static constexpr bool keeps = LANES != 0 && POINTS != 0;
  const T* mask;
  bool softmax;
  C largest, scale;
  C kept[keeps ? (POINTS + LANES - 1) / LANES : 1];

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
    char* memory = static_cast<char*>(shared_memory()) + static_cast<int>(thread_number() / 32) * static_cast<int>(bytes(count, backward));
    weights = reinterpret_cast<Four<C>*>(memory) + unit;
    corners = reinterpret_cast<Four<Index>*>(memory + count * sizeof(Four<C>)) + unit;
    fractions = reinterpret_cast<Fractions<C>*>(memory + count * (sizeof(Four<C>) + sizeof(Four<Index>))) + unit;
  }
};

template <class T, class C, class Index>
DCNV3_DEVICE Four<Index> corners_of(const Problem<C>& q, const Location<C>& at, int group) {
  constexpr Index size = sizeof(T);
  const Index first = ((static_cast<Index>(at.y.low) * q.width + at.x.low) * q.channels +
                       static_cast<Index>(group) * q.group_channels) * size;
  const Index right = q.channels * size, below = q.width * right;
  Four<Index> corners{{first, first + right, first + below, first + right + below}};
  if (!at.has_all()) [[unlikely]] {
    if (!at.x.has_low() || !at.y.has_low()) corners.of[0] = -1;
    if (!at.x.has_high() || !at.y.has_low()) corners.of[1] = -1;
    if (!at.x.has_low() || !at.y.has_high()) corners.of[2] = -1;
    if (!at.x.has_high() || !at.y.has_high()) corners.of[3] = -1;
  }
  return corners;
}

// The channels of a corner; `image` is that of these channels.
template <class T, class Index>
DCNV3_DEVICE const T* at_corner(const T* image, Index corner) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(image) + static_cast<std::make_unsigned_t<Index>>(corner));
}

template <class C>
DCNV3_DEVICE Four<C> weights_of(const Location<C>& at, C modulation) {
  const C bottom = modulation * at.y.fraction, top = modulation * (C(1) - at.y.fraction), left = C(1) - at.x.fraction;
  return {{top * left, top * at.x.fraction, bottom * left, bottom * at.x.fraction}};
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
    C values[4][V] = {};
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      if (has_all || corners.of[corner] >= 0) load<V>(at_corner(image, corners.of[corner]), values[corner]);
    }
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      const C weight = has_all || corners.of[corner] >= 0 ? weights.of[corner] : C(0);  // which may be anything outside
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] += weight * values[corner][v];
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
    const Modulation<T, LANES, POINTS> modulation(q, lanes, points, member, own_mask);
    bool has_all = true;
    for_own_points<LANES, POINTS>(lanes, points, member, [&](int i) {
      const auto at = locate<V, POINTS>(q, unit, member + i, own_offset + 2 * i);
      has_all = has_all && at.has_all();
      shared.corners[(member + i) * units] = corners_of<T, C, Index>(q, at, unit.group);
      shared.weights[(member + i) * units] = weights_of(at, modulation(i));
    });
    has_all = all_lanes(has_all);  // and what they wrote to shared memory is seen by all
    if (unit.active) {
      for (int channel = member * V; channel < channels; channel += lanes * V) {
        const T* from = input + origins.input + channel;
        C sum[V] = {};
        if (POINTS != 0 && has_all) {
          sum_points<true, V, POINTS>(from, shared, points, units, sum);
        } else {
          sum_points<false, V, 0>(from, shared, points, units, sum);
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

// S: where the gradient of the input goes.
template <class T, int V, int LANES, int POINTS, class Index, class S>
DCNV3_KERNEL(256, 2) backward_kernel(
    const Problem<Compute<T>> q, const T* __restrict__ grad_output, const T* __restrict__ input, const T* __restrict__ offset,
    const T* __restrict__ mask, const S grad_input, T* __restrict__ grad_offset, T* __restrict__ grad_mask) {
  typedef Compute<T> C;
  const int lanes = LANES ? LANES : q.lanes, points = POINTS ? POINTS : q.points, units = 32 / lanes;
  const int channels = LANES ? LANES * V : q.group_channels;
  const int member = static_cast<int>(thread_number()) % lanes;
  const Shared<C, Index> shared(lanes, points, true);
  const auto add = grad_input.adder();

  for_units<Index>(q, lanes, [&](const Origins& origins, const Unit<Index>& unit) {
    // of the lane's first point
    const int64_t at_mask = origins.units * points + (unit.number * points + member);
    const T* own_offset = offset + at_mask * 2;
    T* own_grad_offset = grad_offset + at_mask * 2;
    T* own_grad_mask = grad_mask + at_mask;
    const Modulation<T, LANES, POINTS> modulation(q, lanes, points, member, mask + at_mask);
    for_own_points<LANES, POINTS>(lanes, points, member, [&](int i) {
      const auto at = locate<V, POINTS>(q, unit, member + i, own_offset + 2 * i);
      shared.corners[(member + i) * units] = corners_of<T, C, Index>(q, at, unit.group);
      shared.weights[(member + i) * units] = weights_of(at, modulation(i));
      shared.fractions[(member + i) * units] = {at.x.fraction, at.y.fraction};
    });
    sync_warp();

    // For each point: what grad_output times its bilinear sample is, and how it changes with the fractions. These go where
    // the weights were.
    const T* grad = grad_output + origins.units * channels + unit.number * channels;
    C grads[V] = {};
    if (LANES) load<V>(grad + member * V, grads);
    [[maybe_unused]] constexpr int at_once = POINTS ? 3 : 1;
#pragma unroll at_once
    for (int i = 0; i < points; ++i) {
      C products[4] = {};
      if (unit.active) {
        const Four<Index> corners = shared.corners[i * units];
        const Four<C> weights = shared.weights[i * units];
        for (int channel = member * V; channel < channels; channel += lanes * V) {
          if (!LANES) load<V>(grad + channel, grads);
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
      const Fractions<C> fraction = shared.fractions[i * units];
      const C left = C(1) - fraction.x, top = C(1) - fraction.y;
      const C upper = left * products[0] + fraction.x * products[1];
      const C lower = left * products[2] + fraction.x * products[3];
      const C sample = sum_of_lanes(top * upper + fraction.y * lower, lanes);
      const C change_x =
          sum_of_lanes(top * (products[1] - products[0]) + fraction.y * (products[3] - products[2]), lanes);
      const C change_y = sum_of_lanes(lower - upper, lanes);
      sync_warp();
      if (member == 0) shared.weights[i * units] = {{sample, change_x, change_y, C(0)}};
    }
    sync_warp();

    C dot = C(0);
    for_own_points<LANES, POINTS>(lanes, points, member, [&](int i) {
      Four<C>& sums = shared.weights[(member + i) * units];
      const Four<Index> corners = shared.corners[(member + i) * units];
      const bool inside = (corners.of[0] & corners.of[1] & corners.of[2] & corners.of[3]) >= 0;  // else its fraction may be NaN
      const C grad_modulation = inside ? sums.of[0] : C(0);
      const C scaled = modulation(i) * q.offset_scale;
      Pair<T> pair;
      narrow(inside ? scaled * sums.of[1] : C(0), &pair.first);
      narrow(inside ? scaled * sums.of[2] : C(0), &pair.second);
      if (unit.active) {
        if constexpr (V == 1) {
          own_grad_offset[2 * i] = pair.first, own_grad_offset[2 * i + 1] = pair.second;
        } else {
          *reinterpret_cast<Pair<T>*>(own_grad_offset + 2 * i) = pair;
        }
        if (!q.softmax) narrow(grad_modulation, own_grad_mask + i);
      }
      sums.of[0] = grad_modulation;  // this lane alone reads it
      dot += modulation(i) * grad_modulation;
    });
    if (q.softmax) {
      dot = sum_of_lanes(dot, lanes);
      for_own_points<LANES, POINTS>(lanes, points, member, [&](int i) {
        const C grad_logit = modulation(i) * (shared.weights[(member + i) * units].of[0] - dot);
        if (unit.active) narrow(grad_logit, own_grad_mask + i);
      });
    }
    sync_warp();
  });
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
  int vector;  // channels per lane, 1 or 16 bytes of them
  bool wide;   // 64-bit numbers of the elements of an image
  bool small_kernel;  // 3 x 3
  unsigned grid, block, shared_bytes;
  const char* error;
};

inline int log2_ceil(int64_t value) {
  int log2 = 0;
  while ((int64_t(1) << log2) < value) ++log2;
  return log2;
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
  q.grid_x = static_cast<C>(static_cast<double>(s.dilation_w * (s.kernel_w - 1) / 2) * (1 - s.offset_scale));
  q.grid_y = static_cast<C>(static_cast<double>(s.dilation_h * (s.kernel_h - 1) / 2) * (1 - s.offset_scale));
  q.offset_scale = static_cast<C>(s.offset_scale);
  q.softmax = s.softmax;

  const int full = 16 / sizeof(T);
  const int64_t pixels_out = s.height_out * s.width_out;
  plan.wide = s.height * s.width * s.channels * static_cast<int64_t>(sizeof(T)) > INT32_MAX || s.batch * pixels_out > INT32_MAX ||
      pixels_out * s.channels > INT32_MAX || pixels_out * s.groups * s.points * 2 > INT32_MAX;
  plan.vector = aligned && !plan.wide && s.group_channels % full == 0 ? full : 1;
  plan.small_kernel = s.kernel_h == 3 && s.kernel_w == 3;
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
  while (width_log2 + height_log2 > 0 &&
         ((s.groups << (width_log2 + height_log2)) > 4 * warps * units || all_tiles() < 4 * multiprocessors)) {
    if (height_log2 >= width_log2) {
      --height_log2;
    } else {
      --width_log2;
    }
  }
  while (warps > 1 && (s.groups << (width_log2 + height_log2)) <= warps / 2 * units) warps /= 2;
  q.tile_width_log2 = width_log2, q.tile_height_log2 = height_log2;
  q.tiles_x = static_cast<int>(tiles(s.width_out, width_log2));
  const int64_t tiles_per_image = tiles(s.height_out, height_log2) * q.tiles_x;
  if (tiles_per_image > INT32_MAX) {
    plan.error = "an output of so many pixels";
    return plan;
  }
  q.tiles_per_image = static_cast<int>(tiles_per_image);
  q.tiles = all_tiles();
  q.by_tiles_per_image = Divisor(static_cast<uint32_t>(q.tiles_per_image));
  q.by_tiles_x = Divisor(static_cast<uint32_t>(q.tiles_x));
  q.by_groups = Divisor(static_cast<uint32_t>(q.groups));
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

// Calls `run(vector, lanes, points, index)`, constants all but the last, which is of the index' type: those of a
// specialised kernel where there is one for the plan. `specialise`: else general ones only.
template <class T, bool specialise, class Run>
void with_kernel(const Plan<Compute<T>>& plan, Run run) {
  constexpr int full = 16 / sizeof(T);
  if constexpr (specialise && sizeof(T) < 8) {
    if (plan.vector == full && plan.small_kernel && !plan.wide) {
      const int points = plan.problem.points;
      if (plan.problem.group_channels == 16 && plan.problem.lanes == 16 / full) {
        if (points == 9) return run(Constant<full>(), Constant<16 / full>(), Constant<9>(), int32_t());
        return run(Constant<full>(), Constant<16 / full>(), Constant<8>(), int32_t());
      }
      if (plan.problem.group_channels == 32 && plan.problem.lanes == 32 / full) {
        if (points == 9) return run(Constant<full>(), Constant<32 / full>(), Constant<9>(), int32_t());
        return run(Constant<full>(), Constant<32 / full>(), Constant<8>(), int32_t());
      }
    }
  }
  if (plan.wide) return run(Constant<1>(), Constant<0>(), Constant<0>(), int64_t());
  if (plan.vector == full) return run(Constant<full>(), Constant<0>(), Constant<0>(), int32_t());
  run(Constant<1>(), Constant<0>(), Constant<0>(), int32_t());
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
