// In: a `Problem` and the block's number. Out: the units of work of the block's tiles, each with its group and output pixel.
// A unit is one group of one output pixel. A tile is a rectangle of output pixels with all their groups.

#pragma once

#include <type_traits>

#include "problem.h"

namespace dcnv3 {

template <class Index>
struct Unit {
  bool active;   // false: the lane has no work but must take part in the warp's shuffles
  Index number;  // within its image
  Index pixel;   // its output pixel, counted over all images
  int group, x, y;
};

// Where an image begins: its first element in the input, and its first unit in the output and in the gradients.
struct Origins {
  int64_t input, units;
  template <class C>
  DCNV3_DEVICE Origins(const Problem<C>& q, int64_t image)
      : input(image * q.input_of_image), units(image * q.units_of_image) {}
};

// A unit's first point in the tensors of offsets and masks. points: of each unit.
template <class C, class T, class Index>
DCNV3_DEVICE const T* offset_of(const Problem<C>& q, const T* offset, const Unit<Index>& unit, int points) {
  return offset + (static_cast<int64_t>(unit.pixel) * q.offset_pitch + unit.group * (2 * points));
}
template <class C, class T, class Index>
DCNV3_DEVICE const T* mask_of(const Problem<C>& q, const T* mask, const Unit<Index>& unit, int points) {
  return mask + (static_cast<int64_t>(unit.pixel) * q.mask_pitch + unit.group * points);
}

struct Tile {
  uint32_t image;
  int x, y;  // column and row among the image's tiles
};

template <class C>
DCNV3_DEVICE Tile tile_of(const Problem<C>& q, uint32_t number) {
  const uint32_t image = q.by_tiles_per_image(number);
  const uint32_t of_image = number - image * static_cast<uint32_t>(q.tiles_per_image);
  const int y = static_cast<int>(q.by_tiles_x(of_image));
  return {image, static_cast<int>(of_image) - y * q.tiles_x, y};
}

// Calls `work(origins, unit)` for all units of the block's tiles. All lanes of a warp make the same number of calls, as `work`
// exchanges values between them.
template <class Index, class C, class Work>
DCNV3_DEVICE void for_units(const Problem<C>& q, int lanes, Work work) {
  constexpr bool wide = sizeof(Index) == 8;
  typedef std::conditional_t<wide, int64_t, uint32_t> Number;
  const unsigned units = 32u / static_cast<unsigned>(lanes), unit_of_warp = thread_number() % 32 / static_cast<unsigned>(lanes);
  const unsigned warp = thread_number() / 32, warps = block_size() / 32;
  const unsigned tile_units = static_cast<unsigned>(q.tile_units);
  for (Number tile = block_number(); tile < static_cast<Number>(q.tiles); tile += grid_size()) {
    int64_t image;
    int tile_x, tile_y;
    if constexpr (wide) {
      image = tile / q.tiles_per_image;
      const int tile_of_image = static_cast<int>(tile - image * q.tiles_per_image);
      tile_y = tile_of_image / q.tiles_x, tile_x = tile_of_image - tile_y * q.tiles_x;
    } else {
      Tile place = tile_of(q, tile);
      keep(place.image);
      image = place.image, tile_x = place.x, tile_y = place.y;
    }
    const Origins origins(q, image);
    const Index first_pixel = static_cast<Index>(image * q.pixels_of_image);
    for (unsigned first = warp * units; first < tile_units; first += warps * units) {
      const unsigned unit_of_tile = first + unit_of_warp;
      const unsigned pixel = q.by_groups(unit_of_tile);
      Unit<Index> unit;
      unit.group = static_cast<int>(unit_of_tile - pixel * static_cast<unsigned>(q.groups));
      const int row = static_cast<int>(pixel >> q.tile_width_log2);
      unit.x = ((tile_x - row) << q.tile_width_log2) + static_cast<int>(pixel);
      unit.y = (tile_y << q.tile_height_log2) + row;
      unit.active = unit_of_tile < tile_units && unit.x < q.width_out && unit.y < q.height_out;
      if (!unit.active) unit.group = unit.x = unit.y = 0;
      const Index pixel_of_image = static_cast<Index>(unit.y) * q.width_out + unit.x;
      unit.number = pixel_of_image * q.groups + unit.group;
      unit.pixel = first_pixel + pixel_of_image;
      work(origins, unit);
    }
  }
}

}  // namespace dcnv3
