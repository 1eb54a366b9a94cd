// Attention where four query tiles of a row share what is read: a CTA goes through its split's
// blocks with keys and values in shared memory, the next block's under way, and each of the four
// warps has a tile. For prefill, where the same keys would come from the second-level cache once
// for every tile. Bit for bit what attention.cu gives.
#include "attention.cuh"

namespace {

// Shared memory: two stages of a block's keys and values.
template <int DIM> constexpr int kPartBytes = kBlock * DIM * 2;
template <int DIM> constexpr int kStageBytes = 2 * kPartBytes<DIM>;

// Byte offset of 16 bytes of a position's keys. Eight lanes read four neighbours each of two
// positions, which have to be half a turn of the banks apart; rows of 192 bytes are already.
template <int DIM> __device__ uint32_t key_offset(uint32_t position, uint32_t chunk) {
  const uint32_t turn = DIM % 64 == 0 ? position % 2 * 4 : 0;
  return position * (DIM * 2) + ((chunk ^ turn) << 4);
}

// Starts the copies of a block, all threads together. Positions past the last visible one become
// zeros: the cache holds anything there, and 0 times that may be no number.
template <int DIM>
__device__ void copy_block(char *stage, const fb_bf16 *block, uint32_t last) {
  const uint32_t chunk = threadIdx.x % 4;
#pragma unroll
  for (int turn = 0; turn < kBlock / 32; turn++) {
    const uint32_t position = turn * 32 + threadIdx.x / 4;
    const bool visible = position <= last;
    const fb_bf16 *keys = block + min(position, last) * DIM + chunk * 8;
    const fb_bf16 *values = keys + kBlock * DIM;
#pragma unroll
    for (int part = 0; part < DIM / 32; part++) {
      const uint32_t to = part * 4 + chunk;
      fb_cp_async16(stage + key_offset<DIM>(position, to), keys + part * 32, visible);
      fb_cp_async16(stage + kPartBytes<DIM> + value_offset<DIM>(position, to), values + part * 32,
                    visible);
    }
  }
}

// scores = Q.K^T of a block in shared memory.
template <int DIM>
__device__ void score_shared(float (&scores)[kKeyTiles][4], const Queries<DIM> &queries,
                             const char *keys, uint32_t lane) {
#pragma unroll
  for (int tile = 0; tile < kKeyTiles; tile++) {
    float(&sums)[4] = scores[tile];
    sums[0] = sums[1] = sums[2] = sums[3] = 0;
#pragma unroll
    for (int part = 0; part < DIM / 32; part++) {
      const uint32_t offset = key_offset<DIM>(tile * 8 + lane / 4, part * 4 + lane % 4);
      multiply(sums, queries.values[0][part], queries.values[1][part],
               *(const uint4 *)(keys + offset));
    }
  }
}

// A block for a warp's tile, merged into what came before it in the split.
template <int DIM>
__device__ void attend_shared(const fb_attention &p, const Tile &tile, Partial<DIM> &total,
                              const char *stage, uint32_t start, uint32_t lane) {
  Partial<DIM> partial;
  uint32_t weights[kKeyTiles][2];
  uint32_t position[2];
  {
    // Loaded for each block: registers are short, and later loads find them near by.
    const Queries<DIM> queries = load_queries<DIM>(p, tile, lane);
    position[0] = queries.position[0];
    position[1] = queries.position[1];
    float scores[kKeyTiles][4];
    score_shared<DIM>(scores, queries, stage, lane);
    weigh<DIM>(weights, partial, scores, position, start, p.scale_log2, lane);
  }
  mix<DIM>(partial, weights, stage + kPartBytes<DIM>, lane);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    if (start > position[half] || !is_finite(partial.max[half])) {
      continue;
    }
    const Merge merge =
        merge_block(total.max[half], total.sum[half], partial.max[half], partial.sum[half]);
#pragma unroll
    for (int column = 0; column < DIM / 8; column++) {
#pragma unroll
      for (int i = half * 2; i < half * 2 + 2; i++) {
        total.o[column][i] = merge_value(total.o[column][i], partial.o[column][i], merge);
      }
    }
  }
}

template <int DIM> __device__ void clear(Partial<DIM> &total) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    total.max[half] = -INFINITY;
    total.sum[half] = 0;
#pragma unroll
    for (int column = 0; column < DIM / 8; column++) {
      total.o[column][half * 2] = total.o[column][half * 2 + 1] = 0;
    }
  }
}

// Stores a split's result of those rows that reach it.
template <int DIM>
__device__ void store_split(const fb_attention &p, const Tile &tile, const Partial<DIM> &total,
                            uint32_t split, uint32_t lane) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const uint32_t row = lane / 4 + half * 8;
    const uint32_t token = row / tile.group;
    if (token >= tile.tokens || tile.position + token < split * (kWarps * kBlock)) {
      continue;
    }
    const float inverse = inverse_of(total.sum[half]);
    const size_t head = (size_t)(tile.token + token) * p.heads + tile.head + row % tile.group;
    const size_t at = head * p.splits_max + split;
    float *to = p.partial_o + at * DIM + lane % 4 * 2;
#pragma unroll
    for (int column = 0; column < DIM / 8; column++) {
      const float *o = total.o[column] + half * 2;
      *(float2 *)(to + column * 8) =
          make_float2(__fmul_rn(o[0], inverse), __fmul_rn(o[1], inverse));
    }
    if (lane % 4 == 0) {
      *(float2 *)(p.partial_ml + at * 2) = make_float2(total.max[half], total.sum[half]);
    }
  }
}

template <int DIM> __device__ void attention_prefill(const fb_attention &p, char *shared) {
  const fb_query_tile *tiles = p.tiles + blockIdx.x * kWarps;
  const uint32_t row_index = tiles[0].row;
  if (row_index == FB_NONE) {
    return;
  }
  const fb_row row = p.rows[row_index];
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, kv_head = blockIdx.y;
  uint32_t last = 0;
#pragma unroll
  for (int i = 0; i < kWarps; i++) {
    if (tiles[i].row != FB_NONE) {
      last = max(last, tile_of(p, row, tiles[i].token_start, kv_head).last());
    }
  }
  const bool real = tiles[warp].row != FB_NONE;
  const Tile tile = tile_of(p, row, real ? tiles[warp].token_start : 0, kv_head);
  const uint32_t own_last = tile.last();
  const auto copy = [&](uint32_t index) {
    const size_t block = p.blocks[row.block_start + index];
    const fb_bf16 *kv = p.kv + (block * p.kv_heads + kv_head) * (2 * kBlock * DIM);
    copy_block<DIM>(shared + index % 2 * kStageBytes<DIM>, kv,
                    min(last - index * kBlock, kBlock - 1u));
  };
  for (uint32_t split = blockIdx.z; split * (kWarps * kBlock) <= last; split += gridDim.z) {
    const uint32_t end = min(last / kBlock + 1, (split + 1) * kWarps);
    Partial<DIM> total;
    clear<DIM>(total);
    copy(split * kWarps);
    fb_cp_async_commit();
#pragma unroll 1
    for (uint32_t index = split * kWarps; index < end; index++) {
      if (index + 1 < end) {
        copy(index + 1);
      }
      fb_cp_async_commit(); // maybe empty, so that the wait below counts right
      fb_cp_async_wait<1>();
      __syncthreads();
      if (real && index * kBlock <= own_last) {
        attend_shared<DIM>(p, tile, total, shared + index % 2 * kStageBytes<DIM>, index * kBlock,
                           lane);
      }
      __syncthreads(); // before the stage is written again
    }
    if (real) {
      store_split<DIM>(p, tile, total, split, lane);
    }
  }
}

} // namespace

#define FOREBAY_ATTENTION_PREFILL(DIM)                                                             \
  extern "C" __global__ void __launch_bounds__(kWarps * 32, 2)                                     \
      forebay_attention_prefill_##DIM(const __grid_constant__ fb_attention p) {                    \
    FB_DYNAMIC_SHARED(shared);                                                                     \
    attention_prefill<DIM>(p, (char *)shared);                                                     \
  }

FOREBAY_ATTENTION_PREFILL(64)
FOREBAY_ATTENTION_PREFILL(96)
FOREBAY_ATTENTION_PREFILL(128)
