// Weights in their tile layout (abi.h): a lane's share of a tile, and what the tensor cores take.
#pragma once

#include "abi.h"
#include "primitives.cuh"

// A pair of numbers of 0 to 127 in the low bits of each half becomes bf16 by being put into the
// mantissa of 128; what was added is taken off again, both exactly.
constexpr uint32_t kMagic = 0x43004300u; // 128, 128

// The scales of a lane's two rows of a tile: of rows lane/4 and lane/4 + 8.
struct TileScales {
  float d[2];
  float m[2];
};

// Of two f16 in a register, the lower and the higher.
__device__ __forceinline__ float low_f16(uint32_t two) { return fb_from_f16((uint16_t)two); }
__device__ __forceinline__ float high_f16(uint32_t two) { return fb_from_f16((uint16_t)(two >> 16)); }

// kBytes and kScaleBytes are a tile's; `tile` and `scales` point to its own. `step` gives the four
// registers of one of its two steps of 16 columns.
template <int TYPE> struct Tile;

template <> struct Tile<FB_BF16> {
  static constexpr uint32_t kBytes = 1024, kScaleBytes = 0;
  static constexpr bool kScaled = false, kShifted = false;
  uint4 values[2];

  __device__ __forceinline__ void read(const void *tile, const void *, uint32_t lane) {
    values[0] = ((const uint4 *)tile)[lane];
    values[1] = ((const uint4 *)tile)[32 + lane];
  }
  __device__ __forceinline__ void step(int s, uint32_t (&a)[4]) const {
    a[0] = values[s].x, a[1] = values[s].y, a[2] = values[s].z, a[3] = values[s].w;
  }
  __device__ __forceinline__ TileScales scales() const { return {}; }
};

template <> struct Tile<FB_Q8> {
  static constexpr uint32_t kBytes = 512, kScaleBytes = 32;
  static constexpr bool kScaled = true, kShifted = false;
  uint4 values;
  uint32_t d; // of both rows

  __device__ __forceinline__ void read(const void *tile, const void *scales, uint32_t lane) {
    values = ((const uint4 *)tile)[lane];
    d = ((const uint32_t *)scales)[lane / 4];
  }
  __device__ __forceinline__ void step(int s, uint32_t (&a)[4]) const {
    const uint32_t words[2] = {s ? values.z : values.x, s ? values.w : values.y};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      // In two's complement the lower seven bits less 128 if the eighth is set. Those seven go into
      // the mantissa of 128; -128 and -256 as bf16 differ in just the eighth bit.
      const uint32_t two = fb_spread_bytes(words[i / 2], i % 2);
      a[i] = fb_add_bf16x2(fb_mask_or<0x007f007fu>(two, kMagic),
                           fb_mask_or<0x00800080u>(two, 0xc300c300u));
    }
  }
  __device__ __forceinline__ TileScales scales() const {
    return {{low_f16(d), high_f16(d)}, {0, 0}};
  }
};

// A register's two values of 0 to 15, and what is added to them and to the magic 128.
__device__ __forceinline__ uint32_t nibbles(uint32_t word, int i, uint32_t addend) {
  return fb_add_bf16x2(fb_mask_or<0x000f000fu>(word >> (4 * i), kMagic), addend);
}

template <> struct Tile<FB_Q4> {
  static constexpr uint32_t kBytes = 256, kScaleBytes = 32;
  static constexpr bool kScaled = true, kShifted = false;
  uint2 values;
  uint32_t d; // of both rows

  __device__ __forceinline__ void read(const void *tile, const void *scales, uint32_t lane) {
    values = ((const uint2 *)tile)[lane];
    d = ((const uint32_t *)scales)[lane / 4];
  }
  __device__ __forceinline__ void step(int s, uint32_t (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      a[i] = nibbles(s ? values.y : values.x, i, 0xc308c308u); // -136: 128 and 8
    }
  }
  __device__ __forceinline__ TileScales scales() const {
    return {{low_f16(d), high_f16(d)}, {0, 0}};
  }
};

template <> struct Tile<FB_Q4M> {
  static constexpr uint32_t kBytes = 256, kScaleBytes = 64;
  static constexpr bool kScaled = true, kShifted = true;
  uint2 values;
  uint2 dm; // d of both rows, m of both

  __device__ __forceinline__ void read(const void *tile, const void *scales, uint32_t lane) {
    values = ((const uint2 *)tile)[lane];
    dm = ((const uint2 *)scales)[lane / 4];
  }
  __device__ __forceinline__ void step(int s, uint32_t (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      a[i] = nibbles(s ? values.y : values.x, i, 0xc300c300u); // -128
    }
  }
  __device__ __forceinline__ TileScales scales() const {
    return {{low_f16(dm.x), high_f16(dm.x)}, {low_f16(dm.y), high_f16(dm.y)}};
  }
};
