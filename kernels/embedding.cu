// Embedding: rows of a table in its tile layout, as f32.
#include "abi.h"
#include "primitives.cuh"
#include "weights.cuh"

namespace {

// Two neighbouring values of a row, columns 2 pair and 2 pair + 1.
template <int TYPE>
__device__ float2 row_pair(const fb_weight &w, uint32_t row, uint32_t pair) {
  const uint32_t column = pair * 2, in_step = column % 16;
  const size_t tile =
      (size_t)(row / FB_TILE_ROWS) * (w.columns / FB_TILE_COLS) + column / FB_TILE_COLS;
  const uint32_t lane = row % 8 * 4 + in_step % 8 / 2;
  // The register of the step: rows from 8 on are odd ones, columns from 8 on the later two.
  const uint32_t i = in_step / 8 * 2 + row % 16 / 8;
  Tile<TYPE> values;
  values.read((const char *)w.tiles + tile * Tile<TYPE>::kBytes,
              (const char *)w.scales + tile * Tile<TYPE>::kScaleBytes, lane);
  uint32_t a[4];
  column % 32 < 16 ? values.step(0, a) : values.step(1, a);
  const uint32_t two = i == 0 ? a[0] : i == 1 ? a[1] : i == 2 ? a[2] : a[3];
  float2 x = make_float2(fb_from_bf16(two & 0xffff), fb_from_bf16(two >> 16));
  if (Tile<TYPE>::kScaled) {
    const TileScales scales = values.scales();
    const float d = i % 2 ? scales.d[1] : scales.d[0], m = i % 2 ? scales.m[1] : scales.m[0];
    x = make_float2(__fmaf_rn(x.x, d, m), __fmaf_rn(x.y, d, m));
  }
  return x;
}

template <int TYPE> __device__ void embed(const fb_embed &p, uint32_t token, uint32_t row) {
  float2 *x = (float2 *)(p.x + (size_t)token * p.table.columns);
  for (uint32_t pair = threadIdx.x; pair < p.table.columns / 2; pair += blockDim.x) {
    x[pair] = row_pair<TYPE>(p.table, row, pair);
  }
}

} // namespace

// A token a block.
extern "C" __global__ void __launch_bounds__(128)
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
