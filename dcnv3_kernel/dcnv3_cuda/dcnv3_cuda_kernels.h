// The arithmetic of DCNv3 on GPUs.
//
// A unit of work is one group of one output pixel: P points, a softmax over them, and 4 * P short rows of the input, D channels
// each, times a weight each. A unit belongs to `lanes` neighbours of a warp. First they share its points among them: location,
// bilinear fractions and modulation of each are computed once, and put in shared memory. Then each lane sums V channels, 16
// bytes of the input, over all points. Nothing crosses the borders of a warp, so a block never waits.
//
// Blocks take tiles of output pixels, two-dimensional ones, whose points overlap in the first-level cache; within a tile the
// group runs fastest, so the lanes of a warp write neighbouring memory.
//
// A corner of a point outside the image counts as zero. The corner beside it has the same distance along the other axis, so
// both take that one's place, with half of its weight each: no corner needs a branch, and none has weight zero (0 * inf is
// not 0). Points outside are left out.

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

// What a kernel needs to know of a call, and how the work is laid out.
struct Problem {
  int64_t tiles;
  int tiles_x, tiles_per_image, tile_width_log2, tile_height_log2;
  int lanes, points;
  int height, width, height_out, width_out, channels, groups, group_channels;
  int kernel_h, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  int centre;  // the number of the point that is left out, else that of no point
  double grid_x, grid_y, offset_scale;
  bool softmax;
};

// ----------------------------------------------------------------------------------------------------- loads and stores

DCNV3_DEVICE float widen(float value) { return value; }
DCNV3_DEVICE double widen(double value) { return value; }
DCNV3_DEVICE float widen(Half value) { return float_of_half(value.bits); }
DCNV3_DEVICE float widen(BFloat16 value) { return float_of_bits(static_cast<uint32_t>(value.bits) << 16); }

DCNV3_DEVICE uint16_t bfloat16_of_float(float value) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

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
    struct alignas(16) {
      T values[V];
    } packed;
#pragma unroll
    for (int i = 0; i < V; ++i) narrow(values[i], &packed.values[i]);
    *reinterpret_cast<decltype(packed)*>(to) = packed;
  }
}

// The sum over the lanes of a unit, in all of them.
template <class C>
DCNV3_DEVICE C sum_of_lanes(C value, int lanes) {
  for (int d = lanes / 2; d > 0; d /= 2) value += shuffle_xor(value, d);
  return value;
}

// -------------------------------------------------------------------------------------------------------------- units

struct Unit {
  bool active;  // else a lane has nothing to do but takes part in the warp's exchanges
  int64_t number, image;
  int group, x, y;
};

// Calls `work(Unit)` for all units of the block's tiles, the same number of times in all lanes of a warp.
template <class Work>
DCNV3_DEVICE void for_units(const Problem& q, int lanes, Work work) {
  const unsigned units = 32 / lanes, unit_of_warp = thread_number() % 32 / lanes;
  const unsigned warp = thread_number() / 32, warps = block_size() / 32;
  const unsigned tile_units = static_cast<unsigned>(q.groups) << (q.tile_width_log2 + q.tile_height_log2);
  for (int64_t tile = block_number(); tile < q.tiles; tile += grid_size()) {
    const int64_t image = tile / q.tiles_per_image;
    const int tile_of_image = static_cast<int>(tile - image * q.tiles_per_image);
    const int tile_y = tile_of_image / q.tiles_x, tile_x = tile_of_image - tile_y * q.tiles_x;
    for (unsigned first = warp * units; first < tile_units; first += warps * units) {
      const unsigned unit_of_tile = first + unit_of_warp;
      const unsigned pixel = unit_of_tile / static_cast<unsigned>(q.groups);
      Unit unit;
      unit.image = image;
      unit.group = static_cast<int>(unit_of_tile - pixel * static_cast<unsigned>(q.groups));
      unit.x = (tile_x << q.tile_width_log2) + static_cast<int>(pixel & ((1u << q.tile_width_log2) - 1u));
      unit.y = (tile_y << q.tile_height_log2) + static_cast<int>(pixel >> q.tile_width_log2);
      unit.active = unit_of_tile < tile_units && unit.x < q.width_out && unit.y < q.height_out;
      if (!unit.active) unit.group = unit.x = unit.y = 0;
      unit.number = ((image * q.height_out + unit.y) * q.width_out + unit.x) * q.groups + unit.group;
      work(unit);
    }
  }
}

// ------------------------------------------------------------------------------------------------------------- points

// One coordinate of a point: between pixel `low` and, if `step`, the next one; or, at the border, on `low` alone, with the
// weight `factor`, whose derivative is `slope`.
template <class C>
struct Axis {
  bool inside, step;
  int low;
  C fraction, factor, slope;
};

template <class C>
DCNV3_DEVICE Axis<C> place_on_axis(C position, int start, int size) {
  Axis<C> axis;
  const bool countable = position > C(-(1 << 30)) && position < C(1 << 30);  // false for what is not a number
  const C whole = countable ? floor(position) : C(0);
  const C fraction = position - whole;
  const int cell = start + static_cast<int>(whole);
  const bool before = cell < 0, last = cell >= size - 1;
  axis.inside = countable && cell < size && (cell >= 0 || (cell == -1 && fraction > C(0)));
  axis.step = !before && !last;
  axis.low = before ? 0 : cell;
  axis.fraction = axis.step ? fraction : C(0.5);
  axis.factor = before ? fraction : last ? C(1) - fraction : C(1);
  axis.slope = before ? C(1) : last ? C(-1) : C(0);
  return axis;
}

template <class C>
struct Location {
  Axis<C> x, y;
  DCNV3_DEVICE bool inside() const { return x.inside && y.inside; }
};

template <int POINTS, class T>
DCNV3_DEVICE Location<Compute<T>> locate(const Problem& q, const Unit& unit, int points, int point, const T* offset) {
  typedef Compute<T> C;
  int column, row;
  if constexpr (POINTS != 0) {  // 3 x 3, or that without its centre
    const int cell = POINTS == 8 && point >= 4 ? point + 1 : point;
    column = cell / 3, row = cell % 3;
  } else {
    const int cell = point >= q.centre ? point + 1 : point;
    column = cell / q.kernel_h, row = cell % q.kernel_h;
  }
  const T* pair = offset + (unit.number * points + point) * 2;
  const C scale = static_cast<C>(q.offset_scale);
  const C x = static_cast<C>(q.grid_x) + (static_cast<C>(column * q.dilation_w) + widen(pair[0])) * scale;
  const C y = static_cast<C>(q.grid_y) + (static_cast<C>(row * q.dilation_h) + widen(pair[1])) * scale;
  return {
      place_on_axis(x, unit.x * q.stride_w - q.padding_w, q.width),
      place_on_axis(y, unit.y * q.stride_h - q.padding_h, q.height)};
}

// The modulation of a unit's points.
template <class T>
struct Modulation {
  typedef Compute<T> C;
  const T* mask;
  bool softmax;
  C largest, scale;

  template <int POINTS>
  DCNV3_DEVICE static Modulation of(const Problem& q, const Unit& unit, int lanes, int member, int points, const T* mask) {
    Modulation m{mask + unit.number * points, q.softmax, C(0), C(1)};
    if (!q.softmax) return m;
    m.largest = C(-INFINITY);
#pragma unroll
    for (int point = member; point < points; point += lanes) m.largest = fmax(m.largest, widen(m.mask[point]));
    for (int d = lanes / 2; d > 0; d /= 2) m.largest = fmax(m.largest, shuffle_xor(m.largest, d));
    C sum = C(0);
#pragma unroll
    for (int point = member; point < points; point += lanes) sum += exp(widen(m.mask[point]) - m.largest);
    m.scale = C(1) / sum_of_lanes(sum, lanes);
    return m;
  }

  DCNV3_DEVICE C operator[](int point) const {
    const C value = widen(mask[point]);
    return softmax ? exp(value - largest) * scale : value;
  }
};

// What the lanes of a unit tell each other of a point. `index` is the pixel at its upper left times 4, plus 1 if there is one
// to the right, plus 2 if there is one below; negative if the point lies outside.
template <class C, class Index>
struct alignas(4 * sizeof(Index) > 16 ? 8 : 16) Point {
  Index index;
  C fraction_x, fraction_y, weight;
};

template <class C, class Index>
DCNV3_DEVICE Point<C, Index> point_of(const Problem& q, const Location<C>& at, C modulation) {
  if (!at.inside()) return {Index(-1), C(0), C(0), C(0)};
  const Index pixel = static_cast<Index>(at.y.low) * q.width + at.x.low;
  return {
      pixel * 4 + (at.x.step ? 1 : 0) + (at.y.step ? 2 : 0), at.x.fraction, at.y.fraction,
      modulation * at.x.factor * at.y.factor};
}

// The four corners of a point, from the first channel of a lane.
template <class C, class Index>
struct Corners {
  Index first, right, below;
  C weight[4];

  DCNV3_DEVICE Corners(const Problem& q, const Point<C, Index>& point) {
    first = (point.index >> 2) * q.channels;
    right = point.index & 1 ? q.channels : 0;
    below = point.index & 2 ? static_cast<Index>(q.width) * q.channels : 0;
    const C top = point.weight * (C(1) - point.fraction_y), bottom = point.weight * point.fraction_y;
    weight[0] = top * (C(1) - point.fraction_x), weight[1] = top * point.fraction_x;
    weight[2] = bottom * (C(1) - point.fraction_x), weight[3] = bottom * point.fraction_x;
  }
  DCNV3_DEVICE Index operator[](int corner) const { return first + (corner & 1 ? right : 0) + (corner & 2 ? below : 0); }
};

// ------------------------------------------------------------------------------------------------------------ forward

// LANES and POINTS are 0 where they are known at run time only. With LANES, D = LANES * V.
template <class T, int V, int LANES, int POINTS, class Index>
DCNV3_KERNEL(256) forward_kernel(
    const Problem q, const T* __restrict__ input, const T* __restrict__ offset, const T* __restrict__ mask,
    T* __restrict__ output) {
  typedef Compute<T> C;
  const int lanes = LANES ? LANES : q.lanes, points = POINTS ? POINTS : q.points, units = 32 / lanes;
  const int member = thread_number() % lanes;
  Point<C, Index>* shared = static_cast<Point<C, Index>*>(shared_memory()) + thread_number() / 32 * (points * units) +
      thread_number() % 32 / lanes;

  for_units(q, lanes, [&](const Unit& unit) {
    const auto modulation = Modulation<T>::template of<POINTS>(q, unit, lanes, member, points, mask);
#pragma unroll
    for (int point = member; point < points; point += lanes) {
      shared[point * units] =
          point_of<C, Index>(q, locate<POINTS>(q, unit, points, point, offset), modulation[point]);
    }
    sync_warp();
    if (unit.active) {
      const T* image = input + unit.image * q.height * q.width * q.channels + static_cast<Index>(unit.group) * q.group_channels;
      for (int channel = member * V; channel < (LANES ? LANES * V : q.group_channels); channel += lanes * V) {
        C sum[V] = {};
#pragma unroll
        for (int i = 0; i < points; ++i) {
          const Point<C, Index> point = shared[i * units];
          if (point.index < 0) continue;
          const Corners<C, Index> corners(q, point);
          C values[4][V];
#pragma unroll
          for (int corner = 0; corner < 4; ++corner) load<V>(image + corners[corner] + channel, values[corner]);
#pragma unroll
          for (int corner = 0; corner < 4; ++corner) {
#pragma unroll
            for (int v = 0; v < V; ++v) sum[v] += corners.weight[corner] * values[corner][v];
          }
        }
        store<V>(sum, output + unit.number * q.group_channels + channel);
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

  template <int V>
  DCNV3_DEVICE void add(int64_t at, C weight, const C (&values)[V]) const {
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
    const int most = sizeof(C) == 4 ? 120 : 1000;
    return wanted < most ? wanted : most;
  }
  DCNV3_DEVICE C power_of_two(int e) const {
    if constexpr (sizeof(C) == 4) {
      return float_of_bits(static_cast<uint32_t>(e + 127) << 23);
    } else {
      return double_of_bits(0u, static_cast<uint32_t>(e + 1023) << 20);
    }
  }

  template <int V>
  DCNV3_DEVICE void add(int64_t at, C weight, const C (&values)[V], C scale) const {
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

// S: where the gradient of the input goes.
template <class T, int V, int LANES, int POINTS, class Index, class S>
DCNV3_KERNEL(256) backward_kernel(
    const Problem q, const T* __restrict__ grad_output, const T* __restrict__ input, const T* __restrict__ offset,
    const T* __restrict__ mask, const S grad_input, T* __restrict__ grad_offset, T* __restrict__ grad_mask) {
  typedef Compute<T> C;
  const int lanes = LANES ? LANES : q.lanes, points = POINTS ? POINTS : q.points, units = 32 / lanes;
  const int member = thread_number() % lanes;
  Point<C, Index>* shared = static_cast<Point<C, Index>*>(shared_memory()) + thread_number() / 32 * (points * units) +
      thread_number() % 32 / lanes;
  constexpr bool fixed_point = !std::is_same_v<S, FloatingSums<C>>;
  [[maybe_unused]] C scale = C(1);
  if constexpr (fixed_point) scale = grad_input.power_of_two(grad_input.exponent());

  for_units(q, lanes, [&](const Unit& unit) {
    const auto modulation = Modulation<T>::template of<POINTS>(q, unit, lanes, member, points, mask);
#pragma unroll
    for (int point = member; point < points; point += lanes) {
      shared[point * units] =
          point_of<C, Index>(q, locate<POINTS>(q, unit, points, point, offset), modulation[point]);
    }
    sync_warp();

    // For each point: what grad_output times its bilinear sample is, and how it changes with the fractions. These go where
    // the point was.
    const int64_t image = unit.image * q.height * q.width * q.channels + static_cast<Index>(unit.group) * q.group_channels;
    const int channels = LANES ? LANES * V : q.group_channels;
    const T* grad = grad_output + unit.number * q.group_channels;
    C grads[V] = {};
    if (LANES) load<V>(grad + member * V, grads);
#pragma unroll(POINTS ? 3 : 1)
    for (int i = 0; i < points; ++i) {
      const Point<C, Index> point = shared[i * units];
      C sample = C(0), change_x = C(0), change_y = C(0);
      if (unit.active && point.index >= 0) {
        const Corners<C, Index> corners(q, point);
        C products[4] = {};
        for (int channel = member * V; channel < channels; channel += lanes * V) {
          if (!LANES) load<V>(grad + channel, grads);
#pragma unroll
          for (int corner = 0; corner < 4; ++corner) {
            C values[V];
            load<V>(input + image + corners[corner] + channel, values);
#pragma unroll
            for (int v = 0; v < V; ++v) products[corner] += grads[v] * values[v];
            if constexpr (fixed_point) {
              grad_input.template add<V>(image + corners[corner] + channel, corners.weight[corner], grads, scale);
            } else {
              grad_input.template add<V>(image + corners[corner] + channel, corners.weight[corner], grads);
            }
          }
        }
        const C left = C(1) - point.fraction_x, top = C(1) - point.fraction_y;
        const C upper = left * products[0] + point.fraction_x * products[1];
        const C lower = left * products[2] + point.fraction_x * products[3];
        sample = top * upper + point.fraction_y * lower;
        change_x = top * (products[1] - products[0]) + point.fraction_y * (products[3] - products[2]);
        change_y = lower - upper;
      }
      sample = sum_of_lanes(sample, lanes);
      change_x = sum_of_lanes(change_x, lanes);
      change_y = sum_of_lanes(change_y, lanes);
      sync_warp();
      if (member == 0) shared[i * units] = {point.index, change_x, change_y, sample};
    }
    sync_warp();

    C dot = C(0);
#pragma unroll
    for (int i = member; i < points; i += lanes) {
      const Point<C, Index> point = shared[i * units];
      const C weight = modulation[i];
      C grad_modulation = C(0), grad_x = C(0), grad_y = C(0);
      if (point.index >= 0) {
        const auto at = locate<POINTS>(q, unit, points, i, offset);
        const C scaled = weight * static_cast<C>(q.offset_scale);
        grad_modulation = at.x.factor * at.y.factor * point.weight;
        grad_x = scaled * at.y.factor * (at.x.step ? point.fraction_x : at.x.slope * point.weight);
        grad_y = scaled * at.x.factor * (at.y.step ? point.fraction_y : at.y.slope * point.weight);
      }
      if (unit.active) {
        narrow(grad_x, grad_offset + (unit.number * points + i) * 2);
        narrow(grad_y, grad_offset + (unit.number * points + i) * 2 + 1);
        if (!q.softmax) narrow(grad_modulation, grad_mask + unit.number * points + i);
      }
      shared[i * units].weight = grad_modulation;  // this lane alone reads it
      dot += weight * grad_modulation;
    }
    if (q.softmax) {
      dot = sum_of_lanes(dot, lanes);
#pragma unroll
      for (int i = member; i < points; i += lanes) {
        if (unit.active) narrow(modulation[i] * (shared[i * units].weight - dot), grad_mask + unit.number * points + i);
      }
    }
    sync_warp();
  });
}

// The bits, as double, of the largest finite absolute value.
template <class T>
DCNV3_KERNEL(256) largest_kernel(const T* __restrict__ values, int64_t count, unsigned long long* result) {
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
DCNV3_KERNEL(256) fixed_point_to_floating_kernel(FixedPointSums<Compute<T>> from, int64_t count, T* __restrict__ to) {
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

struct Plan {
  Problem problem;
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

// How a call is laid out on a device. `aligned`: all tensors begin at multiples of 16 bytes.
inline Plan plan_call(const Shape& s, int element_size, int compute_size, bool aligned, int multiprocessors) {
  Plan plan{};
  Problem& q = plan.problem;
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
  q.grid_x = static_cast<double>(s.dilation_w * (s.kernel_w - 1) / 2) * (1 - s.offset_scale);
  q.grid_y = static_cast<double>(s.dilation_h * (s.kernel_h - 1) / 2) * (1 - s.offset_scale);
  q.offset_scale = s.offset_scale;
  q.softmax = s.softmax;

  const int full = 16 / element_size;
  plan.wide = s.height * s.width >= limit || s.height * s.width * s.channels > INT32_MAX;
  plan.vector = aligned && !plan.wide && s.group_channels % full == 0 ? full : 1;
  plan.small_kernel = s.kernel_h == 3 && s.kernel_w == 3;
  q.lanes = 1 << log2_ceil((s.group_channels + plan.vector - 1) / plan.vector);
  if (q.lanes > 32) q.lanes = 32;

  // A warp's shared memory holds the points of its units.
  const int64_t point_size = compute_size == 8 ? 32 : plan.wide ? 24 : 16;
  int warps = point_size == 16 ? 8 : 4;
  const auto shared = [&] { return warps * (32 / q.lanes) * s.points * point_size; };
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
  plan.grid = static_cast<unsigned>(q.tiles < INT32_MAX ? q.tiles : INT32_MAX);
  plan.block = static_cast<unsigned>(32 * warps);
  plan.shared_bytes = static_cast<unsigned>(shared());
  return plan;
}

inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

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
void with_kernel(const Plan& plan, Run run) {
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
