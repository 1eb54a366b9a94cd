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

template <int TYPE> struct Tile;

template <> struct Tile<FB_BF16> {
  uint4 values[2];
  static constexpr int kAhead = 4; // tiles that a warp has on their way: 4 KiB
  static constexpr bool kScaled = false, kShifted = false;

  __device__ __forceinline__ void load(const fb_weight &w, size_t tile, uint32_t lane) {
    const uint4 *from = (const uint4 *)w.tiles + tile * 64 + lane;
    values[0] = fb_load_stream(from);
    values[1] = fb_load_stream(from + 32);
  }
  __device__ __forceinline__ void step(int s, uint32_t (&a)[4]) const {
    a[0] = values[s].x, a[1] = values[s].y, a[2] = values[s].z, a[3] = values[s].w;
  }
  __device__ __forceinline__ TileScales scales() const { return {}; }
};

// Of two f16 in a register, the lower and the higher.
__device__ __forceinline__ float low_f16(uint32_t two) { return fb_from_f16((uint16_t)two); }
__device__ __forceinline__ float high_f16(uint32_t two) { return fb_from_f16((uint16_t)(two >> 16)); }

template <> struct Tile<FB_Q8> {
  uint4 values;
  uint32_t d; // of both rows
  static constexpr int kAhead = 4;
  static constexpr bool kScaled = true, kShifted = false;

  __device__ __forceinline__ void load(const fb_weight &w, size_t tile, uint32_t lane) {
    values = fb_load_stream((const uint4 *)w.tiles + tile * 32 + lane);
    d = ((const uint32_t *)w.scales)[tile * 8 + lane / 4];
  }
  __device__ __forceinline__ void step(int s, uint32_t (&a)[4]) const {
    const uint32_t words[2] = {s ? values.z : values.x, s ? values.w : values.y};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      // 8-bit values do not fit the mantissa of bf16; they do that of f32.
      const uint32_t word = (words[i / 2] ^ 0x80808080u) >> (i % 2 * 16);
      const float low = __uint_as_float(0x4b000000u | (word & 0xff));
      const float high = __uint_as_float(0x4b000000u | (word >> 8 & 0xff));
      a[i] = fb_pack_bf16(__fsub_rn(low, 8388736.0f), __fsub_rn(high, 8388736.0f));
    }
  }
  __device__ __forceinline__ TileScales scales() const {
    return {{low_f16(d), high_f16(d)}, {0, 0}};
  }
};

// A register's two values of 0 to 15, less `offset`.
__device__ __forceinline__ uint32_t nibbles(uint32_t word, int i, uint32_t minus_128_and_offset) {
  return fb_add_bf16x2((word >> (4 * i) & 0x000f000fu) | kMagic, minus_128_and_offset);
}

template <> struct Tile<FB_Q4> {
  uint2 values;
  uint32_t d; // of both rows
  static constexpr int kAhead = 8;
  static constexpr bool kScaled = true, kShifted = false;

  __device__ __forceinline__ void load(const fb_weight &w, size_t tile, uint32_t lane) {
    values = fb_load_stream8((const uint2 *)w.tiles + tile * 32 + lane);
    d = ((const uint32_t *)w.scales)[tile * 8 + lane / 4];
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
  static constexpr int kAhead = 4; // more spill beside 32 tokens
  static constexpr bool kScaled = true, kShifted = true;

  __device__ __forceinline__ void load(const fb_weight &w, size_t tile, uint32_t lane) {
    values = fb_load_stream8((const uint2 *)w.tiles + tile * 32 + lane);
    dm = ((const uint2 *)w.scales)[tile * 8 + lane / 4];
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
