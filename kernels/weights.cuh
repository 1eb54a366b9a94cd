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

// Where a lane's share of tiles is: one pointer that moves on, so that those of tiles ahead of it are
// offsets in instructions and not registers.
template <int TYPE> struct Tiles {
  static constexpr uint32_t kLaneBytes = TYPE == FB_BF16 || TYPE == FB_Q8 ? 16 : 8;
  static constexpr uint32_t kBytes = kLaneBytes * 32 * (TYPE == FB_BF16 ? 2 : 1);
  static constexpr uint32_t kScaleBytes = TYPE == FB_BF16 ? 0 : TYPE == FB_Q4M ? 64 : 32;

  const char *values, *scales;

  __device__ __forceinline__ Tiles(const fb_weight &w, size_t tile, uint32_t lane)
      : values((const char *)w.tiles + tile * kBytes + lane * kLaneBytes),
        scales((const char *)w.scales + tile * kScaleBytes + lane / 4 * (kScaleBytes / 8)) {}
  __device__ __forceinline__ void advance(uint32_t tiles) {
    values += tiles * kBytes;
    scales += tiles * kScaleBytes;
  }
};

// A lane's share of a tile, as it is loaded, AT tiles on. kScaled: step() gives what scales() multiply; kShifted:
// and add to.
template <int TYPE> struct Tile;

template <> struct Tile<FB_BF16> {
  uint4 values[2];
  static constexpr bool kScaled = false, kShifted = false;

  template <uint32_t AT> __device__ __forceinline__ void load(const Tiles<FB_BF16> &from) {
    values[0] = fb_load_stream<AT * 1024>(from.values);
    values[1] = fb_load_stream<AT * 1024 + 512>(from.values);
  }
  __device__ __forceinline__ void step(int s, uint32_t (&a)[4]) const {
    a[0] = values[s].x, a[1] = values[s].y, a[2] = values[s].z, a[3] = values[s].w;
  }
  __device__ __forceinline__ TileScales scales() const { return {}; }
};

template <> struct Tile<FB_Q8> {
  uint4 values;
  uint32_t d; // of both rows
  static constexpr bool kScaled = true, kShifted = false;

  template <uint32_t AT> __device__ __forceinline__ void load(const Tiles<FB_Q8> &from) {
    values = fb_load_stream<AT * 512>(from.values);
    d = fb_load_stream4<AT * 32>(from.scales);
  }
  __device__ __forceinline__ void step(int s, uint32_t (&a)[4]) const {
    const uint32_t words[2] = {s ? values.z : values.x, s ? values.w : values.y};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      // Eight bits do not fit the mantissa. The low seven do; the sign counts -128, and put into the
      // lowest bit of the exponent it makes of the -128 to take off a -256.
      const uint32_t two = fb_pick_bytes(words[i / 2], i % 2 ? 0x4342 : 0x4140);
      a[i] = fb_add_bf16x2(fb_mask_or<0x007f007fu>(two, kMagic),
                           fb_mask_or<0x00800080u>(two, 0xc300c300u));
    }
  }
  __device__ __forceinline__ TileScales scales() const {
    return {{low_f16(d), high_f16(d)}, {0, 0}};
  }
};

// A register's two values of 0 to 15, less `offset`.
__device__ __forceinline__ uint32_t nibbles(uint32_t word, int i, uint32_t minus_128_and_offset) {
  return fb_add_bf16x2(fb_mask_or<0x000f000fu>(word >> (4 * i), kMagic), minus_128_and_offset);
}

template <> struct Tile<FB_Q4> {
  uint2 values;
  uint32_t d; // of both rows
  static constexpr bool kScaled = true, kShifted = false;

  template <uint32_t AT> __device__ __forceinline__ void load(const Tiles<FB_Q4> &from) {
    values = fb_load_stream8<AT * 256>(from.values);
    d = fb_load_stream4<AT * 32>(from.scales);
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
  uint2 values;
  uint2 dm; // d of both rows, m of both
  static constexpr bool kScaled = true, kShifted = true;

  template <uint32_t AT> __device__ __forceinline__ void load(const Tiles<FB_Q4M> &from) {
    values = fb_load_stream8<AT * 256>(from.values);
    dm = fb_load_stream8<AT * 64>(from.scales);
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
