// Embedding: rows of a table in its tile layout, as f32.
#include "abi.h"
#include "primitives.cuh"
#include "weights.cuh"

namespace {

constexpr uint32_t kThreads = 128;

// A row in the tiles' layout: of a tile, four lanes have 8 values each of any row.
template <int TYPE> __device__ void embed(const fb_embed &p, uint32_t token, uint32_t row) {
  const uint32_t tiles = p.table.columns / FB_TILE_COLS;
  const uint32_t is_high = row % FB_TILE_ROWS / 8; // rows from 8 on are in the odd registers
  float *x = p.x + (size_t)token * p.table.columns;
#pragma unroll 4
  for (uint32_t at = threadIdx.x; at < tiles * 4; at += kThreads) {
    const uint32_t tile = at / 4, t = at % 4;
    Tile<TYPE> values;
    const size_t number = (size_t)(row / FB_TILE_ROWS) * tiles + tile;
    values.read((const char *)p.table.tiles + number * Tile<TYPE>::kBytes,
                (const char *)p.table.scales + number * Tile<TYPE>::kScaleBytes, row % 8 * 4 + t);
    const TileScales scales = values.scales();
    const float d = is_high ? scales.d[1] : scales.d[0], m = is_high ? scales.m[1] : scales.m[0];
#pragma unroll
    for (int step = 0; step < 2; step++) {
      uint32_t a[4];
      values.step(step, a);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const uint32_t two = is_high ? a[half * 2 + 1] : a[half * 2];
        float2 pair = make_float2(fb_from_bf16(two & 0xffff), fb_from_bf16(two >> 16));
        if (Tile<TYPE>::kScaled) {
          pair = make_float2(__fmaf_rn(pair.x, d, m), __fmaf_rn(pair.y, d, m));
        }
        *(float2 *)(x + tile * FB_TILE_COLS + step * 16 + half * 8 + t * 2) = pair;
      }
    }
  }
}

} // namespace

// A token a block.
extern "C" __global__ void __launch_bounds__(kThreads)
    forebay_embed(const __grid_constant__ fb_embed p) {
  const uint32_t token = blockIdx.x;
  if (token >= p.step->tokens) {
    return;
  }
  uint32_t row = p.token_ids[token];
  if (row == FB_NONE) {
    row = p.last_tokens[p.token_slots[token]];
  }
  if (row >= p.table.rows) {
    return; // nothing of the table; the host checks ids, and a slot holds only sampled ones
  }
  switch (p.table.type) {
  case FB_BF16: return embed<FB_BF16>(p, token, row);
  case FB_Q8: return embed<FB_Q8>(p, token, row);
  case FB_Q4: return embed<FB_Q4>(p, token, row);
  case FB_Q4M: return embed<FB_Q4M>(p, token, row);
  }
}
