// In: a unit and the offset of one of its points. Out: the four pixels (corners) around the sampling location, as byte
// offsets, and their bilinear weights; for the backward pass, the derivatives of the bilinear sample.

#pragma once

#include <type_traits>

#include "numbers.h"
#include "units.h"

namespace dcnv3 {

// One coordinate of a location. It lies between the pixels `low` and `low + 1`, each of which may be outside the image. A
// location counts only strictly inside (-1, size).
template <class C>
struct Axis {
  C position;  // relative to `start`
  int low;
  C fraction;
  int size;

  DCNV3_DEVICE Axis(C at, int start, int size) : position(at), size(size) {
    const int whole = floor_to_int(position);
    fraction = position - static_cast<C>(whole);
    low = static_cast<int>(static_cast<unsigned>(start) + static_cast<unsigned>(whole));
  }
  // Both are false for NaN and for a position beyond the range of an int.
  DCNV3_DEVICE bool has_both() const { return static_cast<unsigned>(low) < static_cast<unsigned>(size - 1) && fraction < C(1); }
  DCNV3_DEVICE bool is_countable() const { return fabs(position) < C(1 << 30); }
  // & and | instead of && and ||: no branches.
  DCNV3_DEVICE bool has_low() const { return is_countable() & (static_cast<unsigned>(low) < static_cast<unsigned>(size)); }
  DCNV3_DEVICE bool has_high() const {
    return is_countable() & (static_cast<unsigned>(low) + 1u < static_cast<unsigned>(size)) & ((low >= 0) | (fraction > C(0)));
  }
};

constexpr int near_limit = 1 << 20;

// One coordinate of a location, like `Axis`, for images and paddings of at most `near_limit` pixels.
struct NearAxis {
  int low;
  float fraction;
  int size;

  NearAxis() = default;
  // start: the pixel at position 0.
  DCNV3_DEVICE NearAxis(float position, int start, int size) : size(size) {
    const float whole = biased_floor(position);
    fraction = position - (whole - floor_bias);
    // For NaN and for positions of 2^22 and more the result is no floor, but it lies outside every image.
    low = static_cast<int>(bits_of_float(whole) - bits_of_float(floor_bias) + static_cast<unsigned>(start));
  }
  DCNV3_DEVICE bool has_both() const { return static_cast<unsigned>(low) < static_cast<unsigned>(size - 1); }
  DCNV3_DEVICE bool has_low() const { return static_cast<unsigned>(low) < static_cast<unsigned>(size); }
  DCNV3_DEVICE bool has_high() const {
    return (static_cast<unsigned>(low) + 1u < static_cast<unsigned>(size)) & ((low >= 0) | (fraction > 0.0f));
  }
};

template <class A>
struct Location {
  A x, y;
  DCNV3_DEVICE bool has_all() const { return x.has_both() && y.has_both(); }
};

// The location of a point. `pair`: its offset, x before y.
template <int V, int POINTS, class T, class Index>
DCNV3_DEVICE Location<Axis<Compute<T>>> locate(
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
      Axis<C>(x, unit.x * q.stride_w + q.start_w, q.width),
      Axis<C>(y, unit.y * q.stride_h + q.start_h, q.height)};
}

// One value for each corner of a point, in the order upper left, upper right, lower left, lower right. A corner is given as
// its byte offset from the beginning of the image; -1 if it is outside the image.
template <class Number>
struct alignas(16) Four {
  Number of[4];
};
template <class C>
struct Fractions {
  C x, y;
};

// The part of shared memory through which the lanes of a unit exchange their points.
template <class C, class Index>
struct Shared {
  Four<C>* weights;  // bilinear weights times the modulation
  Four<Index>* corners;
  Fractions<C>* fractions;  // backward pass only

  // The size for one warp. count: the points of all its units.
  static constexpr int64_t bytes(int64_t count, bool backward) {
    const int64_t point = sizeof(Four<C>) + sizeof(Four<Index>) + (backward ? sizeof(Fractions<C>) : 0);
    return (count * point + 15) / 16 * 16;  // the next warp's part is aligned too
  }
  // Selects this lane's unit. Its point i is at index [i * units].
  DCNV3_DEVICE Shared(int lanes, int points, bool backward) {
    const int units = 32 / lanes, count = points * units, unit = static_cast<int>(thread_number()) % 32 / lanes;
    const int warp = static_cast<int>(thread_number() / 32);
    char* memory = static_cast<char*>(shared_memory()) + warp * static_cast<int>(bytes(count, backward));
    weights = reinterpret_cast<Four<C>*>(memory) + unit;
    corners = reinterpret_cast<Four<Index>*>(memory + count * sizeof(Four<C>)) + unit;
    fractions = reinterpret_cast<Fractions<C>*>(memory + count * (sizeof(Four<C>) + sizeof(Four<Index>))) + unit;
  }
};

// The bilinear weights of the corners, times the modulation.
template <class A, class C>
DCNV3_DEVICE Four<C> weights_of(const Location<A>& at, C modulation) {
  const C bottom = modulation * at.y.fraction, top = modulation * (C(1) - at.y.fraction), left = C(1) - at.x.fraction;
  return {{top * left, top * at.x.fraction, bottom * left, bottom * at.x.fraction}};
}

// The corners of a point. Also sets the weights of corners outside the image to zero, because they may be NaN or infinite.
template <class T, class C, class Index>
DCNV3_DEVICE Four<Index> corners_of(const Problem<C>& q, const Location<Axis<C>>& at, int group, Four<C>& weights) {
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

// The address of a corner. `image`: the image's first pixel, at the channels wanted.
template <class T, class Index>
DCNV3_DEVICE const T* at_corner(const T* image, Index corner) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(image) + static_cast<std::make_unsigned_t<Index>>(corner));
}

// The dot product of grad_output with a bilinear sample, and its derivatives by the location. `products`: the dot products of
// grad_output with the four corners.
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

}  // namespace dcnv3
