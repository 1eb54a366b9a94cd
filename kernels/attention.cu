// Attention where a warp has a block: few queries a sequence, as in decoding; and the merge of
// splits. What is computed, and what is not mixed with what, is said in attention.cuh.
//
// Work is bound by reading keys and values, so everything here serves keeping many reads in flight:
//   - a warp asks for its block's values and most of its keys before it computes;
//   - keys go from memory straight to registers;
//   - only values, which have to be transposed, go through shared memory: 512 x head_dim bytes a
//     CTA, so three fit a multiprocessor at head_dim 128.
#include "attention.cuh"

namespace {

// Shared memory of a warp, used twice: its block's values, then its part of the merge, rows spread
// by 8 floats so that a warp's stores meet no bank twice.
template <int DIM> constexpr int kRowFloats = DIM + 8;
template <int DIM> constexpr int kWarpBytes = kBlock * DIM * 2;
static_assert(kRows * (kRowFloats<64> + 2) * 4 <= kWarpBytes<64>, "the merge must fit");

// Keys of eight positions. Positions past the last visible one repeat it: the cache holds anything
// there, and the score is masked.
template <int DIM>
__device__ void load_keys(uint4 (&keys)[DIM / 32], const fb_bf16 *block, uint32_t tile,
                          uint32_t last, uint32_t lane) {
  const uint32_t position = min(tile * 8 + lane / 4, last);
  const fb_bf16 *from = block + position * DIM + lane % 4 * 8;
#pragma unroll
  for (int part = 0; part < DIM / 32; part++) {
    keys[part] = fb_load_stream(from + part * 32);
  }
}

// Starts the copies of eight positions' values. Positions past the last visible one become zeros:
// their weight is 0, but 0 times what the cache holds there may be no number.
template <int DIM>
__device__ void copy_values(char *to, const fb_bf16 *block, uint32_t tile, uint32_t last,
                            uint32_t lane) {
  const uint32_t position = tile * 8 + lane / 4;
  const fb_bf16 *from = block + min(position, last) * DIM + lane % 4 * 8;
#pragma unroll
  for (int part = 0; part < DIM / 32; part++) {
    fb_cp_async16(to + value_offset<DIM>(position, part * 4 + lane % 4), from + part * 32,
                  position <= last);
  }
}

// scores = Q.K^T of a block, and its values on their way to shared memory.
template <int DIM>
__device__ void score(float (&scores)[kKeyTiles][4], const Queries<DIM> &queries,
                      const fb_bf16 *block, char *values, uint32_t last, uint32_t lane) {
  // Column tiles of keys in flight: what registers allow with three CTAs a multiprocessor.
  constexpr int kAhead = DIM == 64 ? 8 : 4;
  uint4 keys[kAhead][DIM / 32];
#pragma unroll
  for (int tile = 0; tile < kAhead; tile++) {
    load_keys<DIM>(keys[tile], block, tile, last, lane);
  }
#pragma unroll
  for (int tile = 0; tile < kKeyTiles; tile++) {
    copy_values<DIM>(values, block + kBlock * DIM, tile, last, lane);
  }
  fb_cp_async_commit();
#pragma unroll
  for (int tile = 0; tile < kKeyTiles; tile++) {
    uint4(&now)[DIM / 32] = keys[tile % kAhead];
    float(&sums)[4] = scores[tile];
    sums[0] = sums[1] = sums[2] = sums[3] = 0;
#pragma unroll
    for (int part = 0; part < DIM / 32; part++) {
      multiply(sums, queries.values[0][part], queries.values[1][part], now[part]);
    }
    if (tile + kAhead < kKeyTiles) {
      load_keys<DIM>(now, block, tile + kAhead, last, lane);
    }
  }
}

// A warp's whole work on its block; the result lies in its shared memory.
template <int DIM>
__device__ void attend_block(const fb_attention &p, const Queries<DIM> &queries,
                             const fb_bf16 *block, char *shared, uint32_t start, uint32_t last,
                             uint32_t lane) {
  Partial<DIM> partial;
  uint32_t weights[kKeyTiles][2];
  {
    float scores[kKeyTiles][4];
    score<DIM>(scores, queries, block, shared, min(last - start, kBlock - 1u), lane);
    weigh<DIM>(weights, partial, scores, queries.position, start, p.scale_log2, lane);
  }
  fb_cp_async_wait<0>();
  __syncwarp();
  mix<DIM>(partial, weights, shared, lane);
  __syncwarp(); // every lane has read the values
  float *o = (float *)shared;
  float2 *max_sum = (float2 *)(o + kRows * kRowFloats<DIM>);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const uint32_t row = lane / 4 + half * 8;
#pragma unroll
    for (int tile = 0; tile < DIM / 8; tile++) {
      const float *values = partial.o[tile] + half * 2;
      float *to = o + row * kRowFloats<DIM> + tile * 8 + lane % 4 * 2;
      *(float2 *)to = make_float2(values[0], values[1]);
    }
    if (lane % 4 == 0) {
      max_sum[row] = make_float2(partial.max[half], partial.sum[half]);
    }
  }
}

// Merges a split's blocks in order and stores its partial result: eight threads a row.
template <int DIM>
__device__ void merge_blocks(const fb_attention &p, const Tile &tile, const char *shared,
                             uint32_t split) {
  const uint32_t row = threadIdx.x / 8, eighth = threadIdx.x % 8;
  const uint32_t token = row / tile.group;
  const uint32_t own = (tile.position + token) / kBlock; // the row's last block
  if (token >= tile.tokens || own < split * kWarps) {
    return;
  }
  const uint32_t blocks = min(own - split * kWarps + 1, (uint32_t)kWarps);
  float o[DIM / 8] = {};
  float max = -INFINITY, sum = 0;
#pragma unroll
  for (uint32_t block = 0; block < kWarps; block++) {
    const float *from = (const float *)(shared + block * kWarpBytes<DIM>);
    if (block >= blocks) {
      break;
    }
    const float2 max_sum = ((const float2 *)(from + kRows * kRowFloats<DIM>))[row];
    if (!is_finite(max_sum.x)) {
      continue; // no number among its scores
    }
    const Merge merge = merge_block(max, sum, max_sum.x, max_sum.y);
#pragma unroll
    for (int i = 0; i < DIM / 32; i++) {
      const float4 value =
          *(const float4 *)(from + row * kRowFloats<DIM> + (i * 8 + eighth) * 4);
      const float values[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
      for (int j = 0; j < 4; j++) {
        o[i * 4 + j] = merge_value(o[i * 4 + j], values[j], merge);
      }
    }
  }
  const float inverse = inverse_of(sum);
  const size_t head = (size_t)(tile.token + token) * p.heads + tile.head + row % tile.group;
  const size_t at = head * p.splits_max + split;
#pragma unroll
  for (int i = 0; i < DIM / 32; i++) {
    *(float4 *)(p.partial_o + at * DIM + (i * 8 + eighth) * 4) =
        make_float4(__fmul_rn(o[i * 4], inverse), __fmul_rn(o[i * 4 + 1], inverse),
                    __fmul_rn(o[i * 4 + 2], inverse), __fmul_rn(o[i * 4 + 3], inverse));
  }
  if (eighth == 0) {
    *(float2 *)(p.partial_ml + at * 2) = make_float2(max, sum);
  }
}

template <int DIM> __device__ void attention(const fb_attention &p, char *shared) {
  const fb_query_tile query_tile = p.tiles[blockIdx.x];
  if (query_tile.row == FB_NONE) {
    return;
  }
  const fb_row row = p.rows[query_tile.row];
  const uint32_t kv_head = blockIdx.y;
  const Tile tile = tile_of(p, row, query_tile.token_start, kv_head);
  const uint32_t last = tile.last();
  if (blockIdx.z * (kWarps * kBlock) > last) {
    return;
  }
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  char *own = shared + warp * kWarpBytes<DIM>;
  // Splits beyond the grid are taken in turns, so that a launch fits any context.
  for (uint32_t split = blockIdx.z; split * (kWarps * kBlock) <= last; split += gridDim.z) {
    const uint32_t index = split * kWarps + warp;
    if (index * kBlock <= last) {
      const size_t block = p.blocks[row.block_start + index];
      const fb_bf16 *kv = p.kv + (block * p.kv_heads + kv_head) * (2 * kBlock * DIM);
      // Loaded for each split: registers are short, and a second load finds them near by.
      const Queries<DIM> queries = load_queries<DIM>(p, tile, lane);
      attend_block<DIM>(p, queries, kv, own, index * kBlock, last, lane);
    }
    __syncthreads();
    merge_blocks<DIM>(p, tile, shared, split);
    __syncthreads(); // before the next split's values
  }
}

// The sum over a head's splits, in order. A warp a head; a lane has every 32nd value.
template <int DIM> __device__ void attention_merge(const fb_attention &p) {
  const uint32_t token = blockIdx.x, lane = threadIdx.x % 32;
  if (token >= p.step->tokens) {
    return;
  }
  const uint32_t splits = p.positions[token] / (kWarps * kBlock) + 1;
  for (uint32_t head = threadIdx.x / 32; head < p.heads; head += blockDim.x / 32) {
    const size_t at = (size_t)token * p.heads + head;
    const float2 *max_sum = (const float2 *)p.partial_ml + at * p.splits_max;
    const float *partial = p.partial_o + at * p.splits_max * DIM + lane;
    float max = -INFINITY;
    for (uint32_t split = lane; split < splits; split += 32) {
      const float value = max_sum[split].x;
      max = is_finite(value) ? fmaxf(max, value) : max;
    }
    max = fb_warp_max(max);
    float o[DIM / 32] = {}, sum = 0;
    for (uint32_t base = 0; base < splits; base += 32) {
      float weight = 0;
      if (base + lane < splits) {
        const float2 value = max_sum[base + lane];
        weight = is_finite(value.x) ? __fmul_rn(value.y, fb_exp2(__fsub_rn(value.x, max))) : 0;
      }
      const uint32_t end = min(splits - base, 32u);
#pragma unroll 8
      for (uint32_t i = 0; i < end; i++) {
        const float its = __shfl_sync(0xffffffffu, weight, i);
        sum = __fadd_rn(sum, its);
#pragma unroll
        for (int j = 0; j < DIM / 32; j++) {
          o[j] = __fmaf_rn(partial[(size_t)(base + i) * DIM + j * 32], its, o[j]);
        }
      }
    }
    const float inverse = inverse_of(sum);
#pragma unroll
    for (int j = 0; j < DIM / 32; j++) {
      p.y[at * DIM + j * 32 + lane] = fb_to_bf16(__fmul_rn(o[j], inverse));
    }
  }
}

} // namespace

#define FOREBAY_ATTENTION(DIM)                                                                     \
  extern "C" __global__ void __launch_bounds__(kWarps * 32, 3)                                     \
      forebay_attention_##DIM(const __grid_constant__ fb_attention p) {                            \
    FB_DYNAMIC_SHARED(shared);                                                                     \
    attention<DIM>(p, (char *)shared);                                                             \
  }                                                                                                \
  extern "C" __global__ void __launch_bounds__(1024, 1)                                            \
      forebay_attention_merge_##DIM(const __grid_constant__ fb_attention p) {                      \
    attention_merge<DIM>(p);                                                                       \
  }

FOREBAY_ATTENTION(64)
FOREBAY_ATTENTION(96)
FOREBAY_ATTENTION(128)
