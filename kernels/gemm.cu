// Products of weights with the step's activations, and what follows each of them.
//
// Weights are the rows of mma.m16n8k16, tokens its columns: 1 to 64 tokens cost the same reading of
// weights, which is what takes the time, and no token's column knows of another. Each warp has a
// ring of its own for its weights, filled by cp.async several chunks ahead: what is on its way does
// not hang on registers. (Loads into registers were tried: whichever is waited for, later ones that
// share its scoreboard are waited for too, and half of the bandwidth was all there was.) Activations
// come out of L2 through registers, a chunk ahead, into shared memory for all warps of the block.
//
// The order of a token's sum depends on the weight's shape alone: each part of K is summed tile by
// tile, and the parts of a row are added in order, be they several warps' or one's, in turn.
#include "abi.h"
#include "primitives.cuh"
#include "weights.cuh"

namespace {

constexpr int kThreads = FB_GEMM_WARPS * 32;
enum Epilogue { STORE, RESIDUAL, QKV, SWIGLU };

// How K is cut: part s of a row has tiles [first(s), first(s + 1)).
struct Cut {
  uint32_t parts, each, more;
  __device__ __forceinline__ uint32_t first(uint32_t part) const {
    return part * each + min(part, more);
  }
};

// Chunks of activations in shared memory: some columns of every part of K for N tokens, two times.
// A token's 16-byte pieces are turned round by its number, so that the eight rows that ldmatrix
// reads at once lie in different banks.
template <int TYPE, int N> struct Activations {
  static constexpr uint32_t kChunk = N == 64 ? 32 : N == 8 && TYPE != FB_BF16 ? 128 : 64;
  static constexpr uint32_t kTiles = kChunk / FB_TILE_COLS; // tiles of K in a chunk
  static constexpr uint32_t kPieces = kChunk / 8;           // of 16 bytes, in a token's row
  static constexpr uint32_t kPartBytes = N * kChunk * 2;
  static constexpr uint32_t kHeld = FB_GEMM_WARPS * N * kPieces / kThreads; // pieces of a thread

  unsigned char *shared;
  const fb_bf16 *x;
  Cut cut;
  uint32_t bytes; // of a chunk
  uint32_t end;   // elements of x that are real
  uint32_t from;  // this thread's token and piece, in the first column of K
  uint4 held[kHeld];

  static __device__ __forceinline__ uint32_t offset(uint32_t token, uint32_t piece) {
    const uint32_t turn = kPieces == 4 ? token >> 1 & 3 : token & 7;
    return (token * kPieces + (piece ^ turn)) * 16;
  }

  // All pieces of a thread belong to the same token and columns, each to another part of K.
  __device__ __forceinline__ uint32_t part_of(uint32_t i) const {
    return i * (kThreads / (kPieces * N)) + threadIdx.x / (kPieces * N);
  }

  __device__ __forceinline__ void start(const fb_gemm &p, const Cut &of, unsigned char *memory,
                                        uint32_t token, uint32_t count) {
    shared = memory;
    x = p.x;
    cut = of;
    bytes = cut.parts * kPartBytes;
    end = count * p.weight.columns;
    const uint32_t piece = threadIdx.x % kPieces, row = threadIdx.x / kPieces % N;
    from = (token + row) * p.weight.columns + piece * 8;
  }

  // Takes a chunk into registers. Past a row's end comes the next row's beginning, which is not
  // used; past the last row, zeros.
  __device__ __forceinline__ void take(uint32_t chunk) {
#pragma unroll
    for (uint32_t i = 0; i < kHeld; i++) {
      const uint32_t at = from + (cut.first(part_of(i)) + chunk * kTiles) * FB_TILE_COLS;
      const bool ok = part_of(i) < cut.parts && at < end;
      held[i] = ok ? *(const uint4 *)(x + at) : make_uint4(0, 0, 0, 0);
    }
  }

  // Puts what was taken in its place. All pieces of a thread have the same turn.
  __device__ __forceinline__ void put(uint32_t chunk) const {
    unsigned char *to = shared + chunk % 2 * bytes;
    const uint32_t turn = threadIdx.x / (kPieces == 16 ? 16 : 8) & (kPieces == 4 ? 3 : 7);
#pragma unroll
    for (uint32_t i = 0; i < kHeld; i++) {
      const uint32_t at = threadIdx.x + i * kThreads;
      if (at * 16 < bytes) {
        *(uint4 *)(to + (at ^ turn) * 16) = held[i];
      }
    }
  }

  __device__ __forceinline__ const unsigned char *part(uint32_t chunk, uint32_t part) const {
    return shared + chunk % 2 * bytes + part * kPartBytes;
  }
};

// A warp's ring of weights: STAGES chunks of its tiles, their scales behind them.
template <int TYPE, int N> struct Weights {
  static constexpr uint32_t kTiles = Activations<TYPE, N>::kTiles;
  static constexpr uint32_t kTileBytes = kTiles * Tile<TYPE>::kBytes;
  static constexpr uint32_t kScaleBytes = kTiles * Tile<TYPE>::kScaleBytes;
  static constexpr uint32_t kStageBytes = kTileBytes + kScaleBytes;
  static constexpr uint32_t kStages =
      N == 64        ? (TYPE == FB_BF16 ? 5 : 8)
      : N == 8       ? (TYPE == FB_Q8 ? 3 : 4)
      : TYPE == FB_BF16 ? (N == 32 ? 3 : 4)
                        : (TYPE == FB_Q8 ? 5 : 8);

  unsigned char *shared;
  const unsigned char *tiles, *scales;
  uint32_t count; // of the warp's tiles

  // Starts the copies of a chunk. Past the last tile nothing is read.
  __device__ __forceinline__ void fetch(uint32_t chunk, uint32_t lane) const {
    unsigned char *to = shared + chunk % kStages * kStageBytes;
    const uint32_t done = chunk * kTiles, left = count > done ? min(count - done, kTiles) : 0;
#pragma unroll
    for (uint32_t at = 0; at < kTileBytes; at += 512) {
      const uint32_t byte = at + lane * 16;
      // Not a copy of nothing: that would put zeros behind a chunk of less than 512 bytes.
      if (byte < kTileBytes) {
        fb_cp_async16(to + byte, tiles + (size_t)done * Tile<TYPE>::kBytes + byte,
                      byte < left * Tile<TYPE>::kBytes);
      }
    }
    if (Tile<TYPE>::kScaled && lane * 16 < kScaleBytes) {
      fb_cp_async16(to + kTileBytes + lane * 16,
                    scales + (size_t)done * Tile<TYPE>::kScaleBytes + lane * 16,
                    lane * 16 < left * Tile<TYPE>::kScaleBytes);
    }
  }

  __device__ __forceinline__ Tile<TYPE> tile(uint32_t chunk, uint32_t within, uint32_t lane) const {
    const unsigned char *stage = shared + chunk % kStages * kStageBytes;
    Tile<TYPE> tile;
    tile.read(stage + within * Tile<TYPE>::kBytes,
              stage + kTileBytes + within * Tile<TYPE>::kScaleBytes, lane);
    return tile;
  }
};

// A part's sums go to their place in shared memory, or onto those of the warp's parts before it.
template <int N>
__device__ __forceinline__ void put_part(float *parts, const float (&sums)[N / 8][4],
                                         bool is_first) {
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int column = 0; column < N / 8; column++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint32_t token = column * 8 + lane % 4 * 2 + i % 2, row = lane / 4 + i / 2 * 8;
      float &at = parts[(warp * N + token) * FB_GEMM_PITCH + row];
      at = is_first ? sums[column][i] : __fadd_rn(at, sums[column][i]);
    }
  }
}

// Adds a tile of weights times its columns of activations to the sums.
template <int TYPE, int N>
__device__ __forceinline__ void multiply(float (&sums)[N / 8][4], const Tile<TYPE> &tile,
                                         const unsigned char *chunk, uint32_t within,
                                         uint32_t lane) {
  uint32_t a[2][4];
  tile.step(0, a[0]);
  tile.step(1, a[1]);
  const TileScales scales = tile.scales();
  const uint32_t ones[4] = {0x3f803f80u, 0x3f803f80u, 0x3f803f80u, 0x3f803f80u};
#pragma unroll
  for (int column = 0; column < N / 8; column++) {
    uint32_t b[4]; // two steps of 16 rows of K
    fb_ldmatrix_x4(b, chunk + Activations<TYPE, N>::offset(column * 8 + lane % 8, within * 4 + lane / 8));
    float(&sum)[4] = sums[column];
    if (!Tile<TYPE>::kScaled) {
      fb_mma_bf16(sum, a[0], b[0], b[1]);
      fb_mma_bf16(sum, a[1], b[2], b[3]);
      continue;
    }
    float part[4] = {0, 0, 0, 0};
    fb_mma_bf16(part, a[0], b[0], b[1]);
    fb_mma_bf16(part, a[1], b[2], b[3]);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      sum[i] = __fmaf_rn(part[i], scales.d[i / 2], sum[i]);
    }
    if (Tile<TYPE>::kShifted) {
      // The sum of the activations, in every row.
      float total[4] = {0, 0, 0, 0};
      fb_mma_bf16(total, ones, b[0], b[1]);
      fb_mma_bf16(total, ones, b[2], b[3]);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        sum[i] = __fmaf_rn(total[i], scales.m[i / 2], sum[i]);
      }
    }
  }
}

// The sums of a warp's 16 rows: of its part of K as `cut`, and if that is all of K, of the parts
// that K has as `inner`. Gives where the parts lie, [warp][token][FB_GEMM_PITCH].
template <int TYPE, int N>
__device__ __forceinline__ float *accumulate(const fb_gemm &p, unsigned char *shared,
                                             const Cut &cut, const Cut &inner, uint32_t row_tile,
                                             uint32_t part, uint32_t token, uint32_t count) {
  using X = Activations<TYPE, N>;
  using W = Weights<TYPE, N>;
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // The first part is the longest.
  const uint32_t chunks = (cut.first(1) + X::kTiles - 1) / X::kTiles;
  const size_t first =
      (size_t)row_tile * (p.weight.columns / FB_TILE_COLS) + cut.first(part);
  const bool has_rows = row_tile * FB_TILE_ROWS < p.weight.rows;

  X x;
  x.start(p, cut, shared, token, count);
  W weights;
  weights.shared = shared + 2 * x.bytes + warp * (W::kStages * W::kStageBytes);
  weights.tiles = (const unsigned char *)p.weight.tiles + first * Tile<TYPE>::kBytes;
  weights.scales = (const unsigned char *)p.weight.scales + first * Tile<TYPE>::kScaleBytes;
  weights.count = has_rows ? cut.first(part + 1) - cut.first(part) : 0;
  // What is added to as the warp goes cannot lie where the rings are.
  const bool may_turn = N >= FB_GEMM_IN_TURN && cut.parts == 1;
  static_assert(N < FB_GEMM_IN_TURN || X::kTiles == 1, "a part ends with a chunk");
  float *parts = (float *)(shared + (may_turn ? 2 * X::kPartBytes +
                                                    FB_GEMM_WARPS * W::kStages * W::kStageBytes
                                              : 0));
  uint32_t turn = 0, turn_ends = may_turn ? inner.first(1) : 0;
  float sums[N / 8][4] = {};

#pragma unroll
  for (uint32_t chunk = 0; chunk < W::kStages - 1; chunk++) {
    weights.fetch(chunk, lane);
    fb_cp_async_commit();
  }
  x.take(0);
  x.put(0);
  x.take(1);
  for (uint32_t chunk = 0; chunk < chunks; chunk++) {
    fb_cp_async_wait<W::kStages - 2>();
    // This chunk is there for all, and all are done with the one before, whose place is next.
    __syncthreads();
    x.put(chunk + 1);
    x.take(chunk + 2);
    weights.fetch(chunk + W::kStages - 1, lane);
    fb_cp_async_commit();
#pragma unroll
    for (uint32_t within = 0; within < X::kTiles; within++) {
      if (chunk * X::kTiles + within < weights.count) {
        multiply<TYPE, N>(sums, weights.tile(chunk, within, lane), x.part(chunk, part), within,
                          lane);
      }
    }
    if (N >= FB_GEMM_IN_TURN && chunk + 1 == turn_ends) {
      put_part<N>(parts, sums, turn == 0);
#pragma unroll
      for (int i = 0; i < N / 8 * 4; i++) {
        sums[i / 4][i % 4] = 0;
      }
      turn += 1;
      turn_ends = inner.first(turn + 1);
    }
  }
  fb_cp_async_wait<0>();
  __syncthreads();
  if (!may_turn) {
    put_part<N>(parts, sums, true);
    __syncthreads();
  }
  return parts;
}

// What becomes of the two rows of a pair.
__device__ __forceinline__ void swiglu(const fb_gemm &p, uint32_t token, uint32_t pair, float gate,
                                       float up) {
  // x / (1 + e^-x)
  const float e = fb_exp2(__fmul_rn(gate, -1.44269504f));
  const float silu = __fdiv_rn(gate, __fadd_rn(1.0f, e));
  p.y16[(size_t)token * (p.weight.rows / 2) + pair] = fb_to_bf16(__fmul_rn(silu, up));
}

__device__ __forceinline__ void qkv(const fb_gemm &p, uint32_t token, uint32_t pair, float even,
                                    float odd) {
  const uint32_t half = p.head_dim / 2, head = pair / half, within = pair % half * 2;
  if (head < p.heads + p.kv_heads && within < p.rope_dims) {
    const float2 turn =
        ((const float2 *)p.rope)[(size_t)p.positions[token] * (p.rope_dims / 2) + within / 2];
    const float turned = __fmaf_rn(even, turn.x, -__fmul_rn(odd, turn.y));
    odd = __fmaf_rn(even, turn.y, __fmul_rn(odd, turn.x));
    even = turned;
  }
  const uint32_t both = fb_pack_bf16(even, odd);
  if (head < p.heads) {
    ((uint32_t *)p.y16)[(((size_t)token * p.heads + head) * p.head_dim + within) / 2] = both;
    return;
  }
  const uint32_t place = p.kv_places[token];
  if (place == FB_NONE) {
    return;
  }
  const uint32_t is_value = head >= p.heads + p.kv_heads;
  const uint32_t kv_head = head - p.heads - (is_value ? p.kv_heads : 0);
  const size_t plane =
      ((size_t)(place / FB_BLOCK_POSITIONS) * p.kv_heads + kv_head) * 2 + is_value;
  const size_t at = plane * FB_BLOCK_POSITIONS + place % FB_BLOCK_POSITIONS;
  ((uint32_t *)p.kv)[(at * p.head_dim + within) / 2] = both;
}

// The sum of a value's parts, in order.
template <int N>
__device__ __forceinline__ float total(const float *parts, uint32_t tile, uint32_t count,
                                       uint32_t token, uint32_t row) {
  const float *part = parts + ((size_t)tile * count * N + token) * FB_GEMM_PITCH + row;
  float sum = part[0];
  for (uint32_t s = 1; s < count; s++) {
    sum = __fadd_rn(sum, part[s * N * FB_GEMM_PITCH]);
  }
  return sum;
}

// Which rows, counted in blocks, and which tokens a block has. Blocks that run at the same time
// share rows, so that many tokens read the weights from memory once: 16 tiles of tokens to each.
template <int N>
__device__ __forceinline__ void find_block(uint32_t &rows, uint32_t &token) {
  const uint32_t number = blockIdx.y * gridDim.x + blockIdx.x, group = number / (16 * gridDim.x);
  const uint32_t within = number % (16 * gridDim.x), width = min(16u, gridDim.y - group * 16);
  rows = within / width;
  token = (group * 16 + within % width) * N;
}

template <int TYPE, int EPILOGUE, int N> __device__ __forceinline__ void gemm(const fb_gemm &p) {
  FB_DYNAMIC_SHARED(shared);
  uint32_t first_tile, token;
  find_block<N>(first_tile, token);
  const uint32_t count = *p.count;
  if (token >= count) {
    return;
  }
  const uint32_t tokens = min(count - token, (uint32_t)N), warp = threadIdx.x / 32;
  const uint32_t shares = N >= FB_GEMM_IN_TURN && p.in_turn ? 1 : p.ksplit; // warps of a row tile
  const uint32_t tiles = FB_GEMM_WARPS / shares; // of rows, in this block
  first_tile *= tiles;
  const uint32_t k_tiles = p.weight.columns / FB_TILE_COLS;
  const Cut inner = {p.ksplit, k_tiles / p.ksplit, k_tiles % p.ksplit};
  const Cut cut = shares == p.ksplit ? inner : Cut{1, k_tiles, 0};
  const float *parts = accumulate<TYPE, N>(p, shared, cut, inner, first_tile + warp / shares,
                                           warp % shares, token, count);

  constexpr bool kPaired = EPILOGUE == QKV || EPILOGUE == SWIGLU;
  const uint32_t rows = kPaired ? FB_TILE_ROWS / 2 : FB_TILE_ROWS; // or pairs, of a tile
  for (uint32_t at = threadIdx.x; at < tiles * rows * tokens; at += kThreads) {
    const uint32_t row = at % rows, tile = at / rows % tiles, column = at / (rows * tiles);
    const uint32_t out = (first_tile + tile) * rows + row;
    if (out >= (kPaired ? p.weight.rows / 2 : p.weight.rows)) {
      continue;
    }
    const float first = total<N>(parts, tile, shares, column, row);
    if (EPILOGUE == STORE) {
      p.y32[(size_t)(token + column) * p.weight.rows + out] = first;
    } else if (EPILOGUE == RESIDUAL) {
      float *y = p.y32 + (size_t)(token + column) * p.weight.rows + out;
      *y = __fadd_rn(*y, first);
    } else {
      const float second = total<N>(parts, tile, shares, column, row + 8);
      EPILOGUE == QKV ? qkv(p, token + column, out, first, second)
                      : swiglu(p, token + column, out, first, second);
    }
  }
}

} // namespace

#define GEMM(type, TYPE, epilogue, EPILOGUE, n)                                                    \
  extern "C" __global__ void __launch_bounds__(kThreads, 2)                          \
      forebay_gemm_##type##_##epilogue##_##n(const __grid_constant__ fb_gemm p) {                  \
    gemm<TYPE, EPILOGUE, n>(p);                                                                    \
  }
#define GEMM_SIZES(type, TYPE, epilogue, EPILOGUE)                                                 \
  GEMM(type, TYPE, epilogue, EPILOGUE, 8)                                                          \
  GEMM(type, TYPE, epilogue, EPILOGUE, 16)                                                         \
  GEMM(type, TYPE, epilogue, EPILOGUE, 32)                                                         \
  GEMM(type, TYPE, epilogue, EPILOGUE, 64)
#define GEMM_EPILOGUES(type, TYPE)                                                                 \
  GEMM_SIZES(type, TYPE, store, STORE)                                                             \
  GEMM_SIZES(type, TYPE, residual, RESIDUAL)                                                       \
  GEMM_SIZES(type, TYPE, qkv, QKV)                                                                 \
  GEMM_SIZES(type, TYPE, swiglu, SWIGLU)

GEMM_EPILOGUES(bf16, FB_BF16)
GEMM_EPILOGUES(q8, FB_Q8)
GEMM_EPILOGUES(q4, FB_Q4)
GEMM_EPILOGUES(q4m, FB_Q4M)
