// Parameters of every kernel: one struct a family, passed by value as the kernel's only argument.
// Plain C: nvcc, the host build of the kernels and bindgen read the same text.
//
// Words.  token: one position of one sequence in this step; T tokens a step, prefill chunks and
// decode rows back to back.  row: one sequence's part of a step (consecutive tokens).  sampled row:
// a row whose last token's logits are wanted; S of them.  KV block: FB_BLOCK_POSITIONS positions.
// Arrays are dense and row-major, the last dimension contiguous; [T] means padded to the launch.
// bf16 is stored as its 16 bits.  All pointers are device memory, 16-byte aligned.
//
// Batch invariance (a sequence's tokens never depend on its neighbours): no kernel lets tokens
// meet, the order of every sum is fixed by shapes of weights and absolute positions alone, never by
// T, and no float is added atomically.
#ifndef FOREBAY_ABI_H
#define FOREBAY_ABI_H

#include <stdint.h>

typedef uint16_t fb_bf16;
typedef uint16_t fb_f16;

// Positions in a KV block.
#define FB_BLOCK_POSITIONS 64
// KV blocks in a split: attention's partial results are merged over splits of 256 positions, on
// absolute boundaries.
#define FB_SPLIT_BLOCKS 4
// Rows of a weight tile: the M of mma.m16n8k16.
#define FB_TILE_ROWS 16
// Columns of a weight tile: two k16 steps, and one quantisation block of every packed type.
#define FB_TILE_COLS 32
// Marks a padded token or row: nothing is read or written for it.
#define FB_NONE 0xffffffffu
// Alternatives reported for a sampled token, at most.
#define FB_TOP_MAX 20

// ------------------------------------------------------------------------------------- weights

// How a weight matrix [N][K] (output rows, input columns) is stored. N is padded to a multiple of
// 16 with zeros, K must be a multiple of 32.
//
// `tiles` is [N/16][K/32][lane 32][bytes of a lane]: a warp's load of one tile is contiguous, and a
// lane's bytes are its own A fragments of two mma.m16n8k16 steps. With g = lane/4, t = lane%4 and
// step s of 0, 1, the lane's eight values of a step, in order, are at
//     (g, 16s+2t) (g, 16s+2t+1) (g+8, 16s+2t) (g+8, 16s+2t+1)
//     (g, 16s+2t+8) (g, 16s+2t+9) (g+8, 16s+2t+8) (g+8, 16s+2t+9)
// which are a0..a3 of the instruction, two values a register, the lower column in the low half.
//   FB_BF16: 2 x 16 bytes, split in two planes so that each load is one contiguous 512 bytes:
//            [N/16][K/32][step 2][lane 32][8 bf16].
//   FB_Q8:   16 bytes, int8 q of 8 values of step 0, then of step 1.           w = d q
//   FB_Q4:   8 bytes; one uint32 a step, q of 0 to 15: the even values 0 2 4 6  w = d (q - 8)
//            in its low half from bit 0 up, the odd ones 1 3 5 7 in its high half from bit 16 up,
//            so that one shift and one mask bring out the two of a register.
//   FB_Q4M:  as FB_Q4.                                                         w = d q + m
// `scales` is [N/16][K/32][8][2] f16: d of the tile's rows g and g+8; for FB_Q4M [N/16][K/32][8][4]
// f16: d of rows g and g+8, then m of both. Null for FB_BF16.
typedef enum fb_weight_type { FB_BF16 = 0, FB_Q8 = 1, FB_Q4 = 2, FB_Q4M = 3 } fb_weight_type;

typedef struct fb_weight {
  const void *tiles;
  const fb_f16 *scales;
  uint32_t rows;    // N, unpadded
  uint32_t columns; // K
  uint32_t type;    // fb_weight_type
  uint32_t reserved;
} fb_weight;

// Order of rows inside the tiles. Plain: tile i holds rows 16i..16i+15 in order. Paired: two rows
// that an epilogue needs together lie 8 apart, so that one lane holds both: tile row r < 8 of tile i
// is the first of pair 8i+r, tile row r+8 the second.
//   qkv: pair p of a head is its values (2p, 2p+1), as rotated together; rows are the query heads',
//        then the key heads', then the value heads', so pair j is rows (2j, 2j+1).
//   gate|up: pair j is row j of gate and row j of up; N = 2 x ffn.

// ------------------------------------------------------------------------------------ step state

// What all kernels of a step read. Lives in device memory, written once a step by one upload.
typedef struct fb_step {
  uint32_t tokens;   // T that are real
  uint32_t rows;     // R that are real
  uint32_t sampled;  // S that are real
  uint32_t reserved;
} fb_step;

// One row of the step. A decode row has one token.
typedef struct fb_row {
  uint32_t token_start; // index of its first token in the step
  uint32_t token_count;
  uint32_t position;    // absolute position of its first token
  uint32_t block_start; // index of its block table in the step's blocks
  uint32_t slot;        // batch slot: of its sampling state and its last sampled token
  uint32_t sampled;     // index among the sampled rows, or FB_NONE
} fb_row;

// ---------------------------------------------------------------------------------- embedding.cu

// forebay_embed: x[T][K] f32 = rows of the embedding.
// Grid (T), 128 threads. The table is read in its tile layout (plain order of rows), so that a tied
// output head is stored once.
typedef struct fb_embed {
  fb_weight table;            // [vocab][K]
  const fb_step *step;
  const uint32_t *token_ids;  // [T]; FB_NONE: take last_tokens[token_slots[i]]
  const uint32_t *token_slots;// [T] batch slot of each token's row
  const uint32_t *last_tokens;// [slots] the token that each slot sampled last
  float *x;                   // [T][K]
} fb_embed;

// --------------------------------------------------------------------------------------- norm.cu

// forebay_rmsnorm: y = x / sqrt(mean(x^2) + eps) * weight, per row.
// Grid (rows), 256 threads, columns <= 16384, a multiple of 4.
typedef struct fb_rmsnorm {
  const float *x;         // [..][columns]
  const float *weight;    // [columns]
  const uint32_t *gather; // row of x for each row of y, FB_NONE: skip; null: the same row
  fb_bf16 *y;             // [rows][columns]
  const uint32_t *count;  // rows that are real (a field of fb_step)
  uint32_t columns;
  float eps;
} fb_rmsnorm;

// --------------------------------------------------------------------------------------- gemm.cu

// forebay_gemm_<type>_<epilogue>_<n>: C[token][row] = sum over k of W[row][k] X[token][k], and what
// the epilogue makes of it.  type: bf16 q8 q4 q4m.  epilogue: store residual qkv swiglu.
// n: tokens of a CTA's tile, 8 16 32 64.
// Grid (fb_gemm_grid_x, ceil(T/n)), 32 x FB_GEMM_WARPS threads, fb_gemm_shared_bytes. K is cut into
// ksplit (1, 2, 4 or 8) contiguous parts, fixed by the weight's shape (fb_ksplit); each is summed on
// its own and the parts are added in order. Either ksplit warps share a row tile, a part each, or,
// `in_turn`, one warp goes through all parts: the same operations in the same order, so the same
// bits. The first fills a GPU with few tokens, the second reads less of X where there are many. A
// launch in turn passes 1 for ksplit to the two functions of its geometry; kernels for fewer tokens
// than FB_GEMM_IN_TURN cannot do it.
#define FB_GEMM_WARPS 8
#define FB_GEMM_IN_TURN 64

// Warps that share a row tile of a weight [n][k]: as many as give about 128 blocks, as long as each
// warp keeps at least 4 tiles of K. (Twice as many blocks were measured: 2 % faster with one token,
// up to 40 % slower with 64, as every part reads the activations anew.) Depends on shape alone
// (batch invariance).
static inline uint32_t fb_ksplit(uint32_t n, uint32_t k) {
  uint32_t split = 1;
  while (split < FB_GEMM_WARPS && (n / FB_TILE_ROWS) * split < 128 * FB_GEMM_WARPS &&
         k / FB_TILE_COLS / (split * 2) >= 4) {
    split *= 2;
  }
  return split;
}

// Whether a launch for T tokens in tiles of n should take parts in turn: when there is a block for
// every one of 132 SMs even so.
static inline uint32_t fb_gemm_in_turn(uint32_t rows, uint32_t tokens, uint32_t n) {
  return n >= FB_GEMM_IN_TURN &&
         rows / FB_TILE_ROWS / FB_GEMM_WARPS * ((tokens + n - 1) / n) >= 132;
}

// Columns of every part of K that a block works on between two barriers.
// With few tokens there is little to do for each, and half as many barriers count.
static inline uint32_t fb_gemm_chunk(uint32_t type, uint32_t n) {
  return n == 64 ? 32 : n == 8 && type != FB_BF16 ? 128 : 64;
}

// Bytes of a tile of weights with its scales.
static inline uint32_t fb_tile_bytes(uint32_t type) {
  return type == FB_BF16 ? 1024 : type == FB_Q8 ? 544 : type == FB_Q4 ? 288 : 320;
}

// Chunks of weights that each warp has on their way or at hand: with the activations, what lets two
// blocks share a multiprocessor, and three or four with few tokens.
static inline uint32_t fb_gemm_stages(uint32_t type, uint32_t n) {
  if (n == 64) {
    return type == FB_BF16 ? 5 : 8;
  }
  if (n == 8) {
    return type == FB_Q8 ? 3 : 4;
  }
  return type == FB_BF16 ? (n == 32 ? 3 : 4) : type == FB_Q8 ? 5 : 8;
}
// Floats between two tokens of a warp's part of the result in shared memory: 16 rows, and 4 so that
// a warp's stores meet no bank twice.
#define FB_GEMM_PITCH 20

static inline uint32_t fb_gemm_grid_x(uint32_t rows, uint32_t ksplit) {
  const uint32_t tiles = (rows + FB_TILE_ROWS - 1) / FB_TILE_ROWS, each = FB_GEMM_WARPS / ksplit;
  return (tiles + each - 1) / each;
}

// Dynamic shared memory: two chunks of X and the warps' weights; then, in the same place, the parts
// of the result; behind it where a warp may add to them as it goes.
static inline uint32_t fb_gemm_shared_bytes(uint32_t type, uint32_t n, uint32_t ksplit) {
  const uint32_t chunk = fb_gemm_chunk(type, n);
  const uint32_t weights =
      FB_GEMM_WARPS * fb_gemm_stages(type, n) * (chunk / FB_TILE_COLS) * fb_tile_bytes(type);
  const uint32_t used = 2 * ksplit * n * chunk * 2 + weights;
  const uint32_t parts = FB_GEMM_WARPS * n * FB_GEMM_PITCH * 4;
  if (n >= FB_GEMM_IN_TURN && ksplit == 1) {
    return used + parts;
  }
  return used > parts ? used : parts;
}

typedef struct fb_gemm {
  fb_weight weight;
  const fb_bf16 *x;      // [T][K]
  const uint32_t *count; // tokens that are real (a field of fb_step)
  uint32_t ksplit;
  uint32_t in_turn; // 1: a warp goes through its row tile's parts of K, 0: ksplit warps have one each
  // store: y32[T][N] = C (the logits).   residual: y32[T][N] += C.
  float *y32;
  // swiglu (paired rows): y16[T][N/2] = bf16(silu(gate) x up).   qkv: the queries, [T][heads][head_dim].
  fb_bf16 *y16;
  // qkv (paired rows): rotates queries and keys, writes keys and values to the cache.
  const float *rope;          // [context][rope_dims/2][2] cosine, sine
  const uint32_t *positions;  // [T] absolute position of each token
  const uint32_t *kv_places;  // [T] block x 64 + position in it, FB_NONE: not written
  fb_bf16 *kv;                // this layer's cache: [block][kv_head][K, V][64][head_dim]
  uint32_t heads;
  uint32_t kv_heads;
  uint32_t head_dim;
  uint32_t rope_dims;         // values of a head that are rotated: its first, even
} fb_gemm;

// ---------------------------------------------------------------------------------- attention.cu

// forebay_attention_<head_dim>: head_dim 64 96 128. Softmax over positions 0..=own of q.k x scale.
// For each token and head: each absolute block of 64 positions gives (m, l, o) on its own
// (base-2 exponents, p rounded to bf16 before p.v, l summed from unrounded p); a split's four blocks
// are merged in order, then splits in order by forebay_attention_merge. The same operations in the
// same order whether a tile holds one token (decode) or several (prefill).
// A query tile: 16 rows = consecutive tokens of one row x the query heads of one kv head, token
// major; tokens of a tile = max(1, 16 / group). A CTA of 4 warps has one tile and one split: warp w
// has block w of the split.
// heads / kv_heads is at most 16.
// Grid (query tiles, kv_heads, z), 128 threads, FB_ATTENTION_SHARED_BYTES; a CTA takes splits
// blockIdx.z, + z and so on, and ends at once where they begin beyond its tile's last position. So
// any z is right for any context, as a captured graph needs; splits of the longest one are fastest.
// forebay_attention_prefill_<head_dim>: the same bits, for rows of many tokens. Grid (query tiles /
// 4, kv_heads, z): a CTA has four query tiles, all of one row, FB_NONE at the end where a row has
// no more; warp w has tile w and goes through the split's blocks, which all four share.
#define FB_ATTENTION_SHARED_BYTES(head_dim) (512 * (head_dim))
typedef struct fb_query_tile {
  uint32_t row;         // index into rows, FB_NONE: padding
  uint32_t token_start; // first token, counted within the row
} fb_query_tile;

typedef struct fb_attention {
  const fb_bf16 *q;           // [T][heads][head_dim]
  const fb_bf16 *kv;          // this layer's cache
  const fb_row *rows;         // [R]
  const uint32_t *blocks;     // block tables, back to back
  const fb_query_tile *tiles; // [query tiles]
  const uint32_t *positions;  // [T]
  const fb_step *step;
  float *partial_o;           // [T][heads][splits_max][head_dim], o / l of the split
  float *partial_ml;          // [T][heads][splits_max][2] m, l
  fb_bf16 *y;                 // [T][heads][head_dim], written by the merge
  uint32_t heads;
  uint32_t kv_heads;
  uint32_t splits_max;        // stride of the partials: ceil(context / 256)
  float scale_log2;           // log2(e) / sqrt(head_dim)
} fb_attention;

// forebay_attention_merge_<head_dim>: grid (T), threads = min(1024, heads x 32): a warp a head.

// ----------------------------------------------------------------------------------- sampling.cu

// Sampling state of one batch slot, set up when a sequence gets the slot.
typedef struct fb_slot {
  uint64_t seed;
  float temperature; // 0: greedy
  float top_p;       // 1: off
  float min_p;       // 0: off
  float repetition_penalty; // 1: off
  float frequency_penalty;
  float presence_penalty;
  uint32_t top_k;    // 0: off
  uint32_t bias_start; // in biases
  uint32_t bias_count;
  uint32_t logprobs; // 0: none, n+1: the token's own and n alternatives
} fb_slot;

typedef struct fb_bias {
  uint32_t token;
  float bias;
} fb_bias;

typedef struct fb_sampled {
  uint32_t token;
  float logprob;
  uint32_t top_count;
  uint32_t reserved;
  uint32_t top_tokens[FB_TOP_MAX];
  float top_logprobs[FB_TOP_MAX];
} fb_sampled;

// forebay_sample: grid (S), 1024 threads. Penalties, bias, temperature, then top-k, top-p and min-p
// as cuts in the order of likelihood (ties: lowest id first), the draw in order of id with
// uniform(seed, position), all as src/device/cpu/sample does it; greedy takes the lowest id among
// the largest. The token is counted and kept for its slot.
typedef struct fb_sample {
  float *logits;            // [S][vocab]; changed by penalties and bias
  const uint32_t *sampled_rows; // [S] index into rows
  const fb_row *rows;
  const fb_step *step;
  const fb_slot *slots;     // [slots]
  const fb_bias *biases;
  uint32_t *counts;         // [slots][vocab]: output occurrences; bit 31: in the prompt
  uint32_t *last_tokens;    // [slots]
  fb_sampled *results;      // [S]
  uint32_t vocab;
  uint32_t reserved;
} fb_sample;

// forebay_count: sets counts of slots that change hands: grid (setups), 256 threads.
typedef struct fb_slot_setup {
  uint32_t slot;
  uint32_t history_start; // in history
  uint32_t history_count;
  uint32_t history_prompt_count;
} fb_slot_setup;

typedef struct fb_count {
  const fb_slot_setup *setups; // [setups]
  const uint32_t *history;
  uint32_t *counts;            // [slots][vocab]: cleared, then counted
  uint32_t vocab;
  uint32_t setups_count;
} fb_count;

// ------------------------------------------------------------------------------------------ kv.cu

// forebay_kv_copy: copies KV blocks within the cache, all layers: grid (pairs, layers), 256 threads.
typedef struct fb_kv_copy {
  fb_bf16 *kv;             // layer 0's cache
  const uint32_t *pairs;   // [pairs][2] from, to
  uint64_t layer_elements; // bf16 values between a layer's cache and the next one's
  uint64_t block_elements; // bf16 values of a block in one layer
} fb_kv_copy;

#endif
