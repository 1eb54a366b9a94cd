// What the kernels of attention share: a warp's queries, the weights of a block and its result. The
// kernels differ in how keys and values reach a warp, not in one bit of what it makes of them.
//
// Q.K^T and P.V are mma.m16n8k16 with the queries as rows: the query heads that share a kv head,
// and the next tokens if there is room, fill the 16 rows. heads / kv_heads must be at most 16.
//
// A sum over the head's dimensions may be taken in any order as long as queries and keys agree, so
// a lane takes 8 dimensions in a row (16 bytes), which stand for k = 2t, 2t+1, 2t+8, 2t+9 of two
// mma steps: keys need no shuffle between memory and the instruction.
//
// What a query gets depends on nothing but itself, its positions' keys and values, and the absolute
// position: mma rows do not meet, and blocks beyond a query's own position are left out of its
// merge, though another row of the tile may need them.
#pragma once
#include "abi.h"
#include "primitives.cuh"

namespace {

constexpr int kBlock = FB_BLOCK_POSITIONS;
constexpr int kWarps = FB_SPLIT_BLOCKS;
constexpr int kRows = 16;
constexpr int kKeyTiles = kBlock / 8; // mma column tiles of Q.K^T

// What a lane knows of its two rows of the tile: lane/4 and lane/4 + 8.
template <int DIM> struct Queries {
  uint4 values[2][DIM / 32];
  uint32_t position[2]; // of the row's token
};

// A block's result for a lane's two rows.
template <int DIM> struct Partial {
  float o[DIM / 8][4];
  float max[2];
  float sum[2];
};

// Which tokens, heads and positions a CTA has.
struct Tile {
  uint32_t token;    // first token in the step
  uint32_t tokens;
  uint32_t position; // of the first token
  uint32_t head;     // first query head
  uint32_t group;
  __device__ uint32_t last() const { return position + tokens - 1; }
};

__device__ Tile tile_of(const fb_attention &p, const fb_row &row, uint32_t token_start,
                        uint32_t kv_head) {
  Tile tile;
  tile.group = p.heads / p.kv_heads;
  tile.head = kv_head * tile.group;
  tile.token = row.token_start + token_start;
  tile.tokens = min(max(kRows / tile.group, 1u), row.token_count - token_start);
  tile.position = row.position + token_start;
  return tile;
}

__device__ bool is_finite(float x) { return fabsf(x) < INFINITY; }

// Byte offset of 16 bytes of a position's values. Eight positions in a row have to lie in eight
// different groups of four banks for ldmatrix; rows of 192 bytes are half a turn apart already.
template <int DIM> __device__ uint32_t value_offset(uint32_t position, uint32_t chunk) {
  const uint32_t turn = DIM % 64 == 0 ? position & 7 : position >> 1 & 3;
  return position * (DIM * 2) + ((chunk ^ turn) << 4);
}

template <int DIM>
__device__ Queries<DIM> load_queries(const fb_attention &p, const Tile &tile, uint32_t lane) {
  Queries<DIM> queries;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const uint32_t row = lane / 4 + half * 8;
    const uint32_t token = row / tile.group;
    const bool real = token < tile.tokens;
    queries.position[half] = tile.position + (real ? token : 0);
    const uint32_t head = tile.head + row % tile.group;
    const size_t at = ((size_t)(tile.token + token) * p.heads + head) * DIM + lane % 4 * 8;
#pragma unroll
    for (int part = 0; part < DIM / 32; part++) {
      queries.values[half][part] =
          real ? *(const uint4 *)(p.q + at + part * 32) : make_uint4(0, 0, 0, 0);
    }
  }
  return queries;
}

// Adds the products of two rows of queries with eight positions' keys, 32 dimensions.
__device__ void multiply(float (&sums)[4], const uint4 &low, const uint4 &high,
                         const uint4 &keys) {
  const uint32_t first[4] = {low.x, high.x, low.y, high.y};
  const uint32_t second[4] = {low.z, high.z, low.w, high.w};
  fb_mma_bf16(sums, first, keys.x, keys.y);
  fb_mma_bf16(sums, second, keys.z, keys.w);
}

// Masks and scales scores, makes them weights, packed as the A operand of P.V.
template <int DIM>
__device__ void weigh(uint32_t (&weights)[kKeyTiles][2], Partial<DIM> &partial,
                      float (&scores)[kKeyTiles][4], const uint32_t (&position)[2],
                      uint32_t start, float scale_log2, uint32_t lane) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float max = -INFINITY;
#pragma unroll
    for (int tile = 0; tile < kKeyTiles; tile++) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float &score = scores[tile][half * 2 + i];
        const bool visible = start + tile * 8 + lane % 4 * 2 + i <= position[half];
        score = visible ? __fmul_rn(score, scale_log2) : -INFINITY;
        max = fmaxf(max, score);
      }
    }
    max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 1));
    max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 2));
    const float shift = is_finite(max) ? max : 0;
    float sum = 0;
#pragma unroll
    for (int tile = 0; tile < kKeyTiles; tile++) {
      const float first = fb_exp2(__fsub_rn(scores[tile][half * 2], shift));
      const float second = fb_exp2(__fsub_rn(scores[tile][half * 2 + 1], shift));
      sum = __fadd_rn(sum, __fadd_rn(first, second));
      weights[tile][half] = fb_pack_bf16(first, second);
    }
    sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, 1));
    sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, 2));
    partial.max[half] = max;
    partial.sum[half] = sum;
  }
}

// o = P.V, values in shared memory.
template <int DIM>
__device__ void mix(Partial<DIM> &partial, const uint32_t (&weights)[kKeyTiles][2],
                    const char *values, uint32_t lane) {
#pragma unroll
  for (int tile = 0; tile < DIM / 8; tile++) {
    float(&o)[4] = partial.o[tile];
    o[0] = o[1] = o[2] = o[3] = 0;
  }
#pragma unroll
  for (int step = 0; step < kBlock / 16; step++) {
    const uint32_t a[4] = {weights[2 * step][0], weights[2 * step][1], weights[2 * step + 1][0],
                           weights[2 * step + 1][1]};
#pragma unroll
    for (int pair = 0; pair < DIM / 16; pair++) {
      uint32_t b[4];
      const uint32_t position = step * 16 + lane % 16;
      fb_ldmatrix_x4_trans(b, values + value_offset<DIM>(position, pair * 2 + lane / 16));
      fb_mma_bf16(partial.o[2 * pair], a, b[0], b[1]);
      fb_mma_bf16(partial.o[2 * pair + 1], a, b[2], b[3]);
    }
  }
}

// How a block joins what came before it: both are scaled to the larger maximum.
struct Merge {
  float before, now;
};

__device__ Merge merge_block(float &max, float &sum, float block_max, float block_sum) {
  const float merged = fmaxf(max, block_max);
  const Merge merge = {fb_exp2(__fsub_rn(max, merged)), fb_exp2(__fsub_rn(block_max, merged))};
  max = merged;
  sum = __fmaf_rn(sum, merge.before, __fmul_rn(block_sum, merge.now));
  return merge;
}

__device__ float merge_value(float o, float block_o, const Merge &merge) {
  return __fmaf_rn(o, merge.before, __fmul_rn(block_o, merge.now));
}

__device__ float inverse_of(float sum) { return sum > 0 ? __frcp_rn(sum) : 0; }

} // namespace
