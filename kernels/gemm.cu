// Products of weights with the step's activations, and what follows each of them.
//
// Weights are the rows of mma.m16n8k16, tokens its columns: 1 to 64 tokens cost the same reading of
// weights, which is what takes the time, and no token's column knows of another. Weights go from
// memory straight to registers, several tiles ahead of their use, each load of a warp one piece of
// 256 or 512 bytes. Activations are staged in shared memory by cp.async, for all warps of the block.
//
// The order of a token's sum depends on the weight's shape alone: each part of K is summed tile by
// tile, and the parts of a row are added in order, by whichever warps.
#include "abi.h"
#include "primitives.cuh"
#include "weights.cuh"

namespace {

constexpr uint32_t kThreads = FB_GEMM_WARPS * 32;
enum Epilogue { STORE, RESIDUAL, QKV, SWIGLU };

// Tiles that a warp has on their way to it: as many as registers allow, whole chunks of the ring.
template <int TYPE, int N>
constexpr uint32_t kTilesAhead = TYPE == FB_BF16  ? (N <= 16 ? 8 : 4)
                                 : TYPE == FB_Q8  ? (N <= 16 ? 8 : 4)
                                 : TYPE == FB_Q4  ? (N <= 16 ? 16 : 8)
                                                  : (N <= 16 ? 12 : 4);

template <uint32_t AT> struct Constant {
  __device__ constexpr operator uint32_t() const { return AT; }
};

// body(0), body(1) and so on to END, each with its number as a constant, until one gives false.
template <uint32_t AT, uint32_t END, typename Body>
__device__ __forceinline__ void unrolled(const Body &body) {
  if constexpr (AT < END) {
    if (body(Constant<AT>())) {
      unrolled<AT + 1, END>(body);
    }
  }
}

// The ring of activations: FB_GEMM_STAGES stages, each with some columns of the parts that the
// block works at, for N tokens. A token's 16-byte pieces are turned round by its number, so that the
// eight rows that ldmatrix reads at once lie in different banks.
template <int N> struct Ring {
  static constexpr uint32_t kColumns = FB_GEMM_CHUNK(N);
  static constexpr uint32_t kTiles = kColumns / FB_TILE_COLS; // tiles of K in a chunk
  static constexpr uint32_t kPieces = kColumns / 8;           // of 16 bytes, in a token's row
  static constexpr uint32_t kPartBytes = N * kColumns * 2;
  // How threads share the copying: a thread has a piece of some tokens of some parts.
  static constexpr uint32_t kTokensAtOnce = N * kPieces < kThreads ? N : kThreads / kPieces;
  static constexpr uint32_t kPartsAtOnce = kThreads / (kTokensAtOnce * kPieces);
  static_assert(kTokensAtOnce % 8 == 0, "a thread's pieces are turned round alike");

  static __device__ __forceinline__ uint32_t offset(uint32_t token, uint32_t piece) {
    const uint32_t turn = kPieces >= 8 ? token & 7 : token >> 1 & 3;
    return (token * kPieces + (piece ^ turn)) * 16;
  }
};

// The share of the product that a warp has.
struct Work {
  uint32_t tiles;       // of K
  uint32_t each;        // tiles of a part of K, the last ones' excepted
  uint32_t chunks;      // of the ring, for all parts that the block works at
  uint32_t shares;      // warps of a row tile
  uint32_t row_tiles;   // of the block
  uint32_t first_tile;  // the block's first row tile
  uint32_t token, tokens; // the block's first token, and how many
  uint32_t row_tile, part, parts; // the warp's: of all row tiles; its first part of K, and how many
};

// Which tile of rows and tokens a block has. Blocks that run at the same time share rows, so that
// many tokens read the weights from memory once: 16 tiles of tokens go with each tile of rows.
template <int N> __device__ __forceinline__ Work find_work(const fb_gemm &p) {
  const uint32_t linear = blockIdx.y * gridDim.x + blockIdx.x, group = linear / (16 * gridDim.x);
  const uint32_t within = linear % (16 * gridDim.x), width = min(16u, gridDim.y - group * 16);
  const uint32_t warp = threadIdx.x / 32;
  Work work;
  work.token = (group * 16 + within % width) * N;
  work.tokens = 0;
  work.tiles = p.weight.columns / FB_TILE_COLS;
  work.each = (work.tiles + p.ksplit - 1) / p.ksplit;
  const bool in_turn = N >= FB_GEMM_IN_TURN && p.in_turn;
  work.shares = in_turn ? 1 : p.ksplit;
  work.parts = in_turn ? p.ksplit : 1;
  work.chunks = work.parts * ((work.each + Ring<N>::kTiles - 1) / Ring<N>::kTiles);
  const uint32_t shift = 31 - __clz(work.shares); // a power of 2
  work.row_tiles = FB_GEMM_WARPS >> shift;
  work.first_tile = within / width * work.row_tiles;
  work.row_tile = work.first_tile + (warp >> shift);
  work.part = warp & (work.shares - 1);
  return work;
}

// A warp's weights, on their way from memory.
template <int TYPE, int N> struct Stream {
  static constexpr uint32_t kAhead = kTilesAhead<TYPE, N>;

  Tile<TYPE> tiles[kAhead];
  Tiles<TYPE> from;
  uint32_t count;  // tiles of the part
  uint32_t loaded; // and those that are loaded before the next part begins

  __device__ __forceinline__ Stream(const fb_gemm &p, const Work &work)
      : from(p.weight, 0, 0), count(0), loaded(0) {
    begin_part(p, work, 0);
  }
  __device__ __forceinline__ void begin_part(const fb_gemm &p, const Work &work, uint32_t turn) {
    const uint32_t begin = min((work.part + turn) * work.each, work.tiles);
    const bool has_rows = work.row_tile * FB_TILE_ROWS < p.weight.rows;
    // They are loaded on into the next part where its tiles fall to the same registers.
    const bool runs_on = work.each % kAhead == 0 && work.parts > 1;
    count = has_rows ? min(work.each, work.tiles - begin) : 0;
    loaded = has_rows && runs_on ? work.tiles - begin : count;
    from = Tiles<TYPE>(p.weight, (size_t)work.row_tile * work.tiles + begin, threadIdx.x % 32);
    if (turn == 0 || !runs_on) {
      unrolled<0, kAhead>([&](auto slot) {
        if (slot < loaded) {
          tiles[slot].template load<slot>(from);
        }
        return true;
      });
    }
  }
};

// Fills the ring, chunk after chunk; a thread's pieces of each. Columns past the end of K and tokens
// past the last are zeros.
template <int N> class Feed {
public:
  __device__ __forceinline__ Feed(const fb_gemm &p, const Work &work)
      : each_(work.each), within_(0), chunks_left_(work.chunks) {
    const uint32_t piece = threadIdx.x % R::kPieces, columns = p.weight.columns;
    const uint32_t token = threadIdx.x / R::kPieces % R::kTokensAtOnce;
    const uint32_t part = threadIdx.x / (R::kPieces * R::kTokensAtOnce);
    copies_ = (work.shares + R::kPartsAtOnce - 1 - part) / R::kPartsAtOnce;
    column_ = part * each_ * FB_TILE_COLS + piece * 8;
#pragma unroll
    for (uint32_t turn = 0; turn < kTurns; turn++) {
      const uint32_t its = token + turn * R::kTokensAtOnce;
      const bool is_real = its < work.tokens;
      limit_[turn] = is_real ? columns : 0;
      from_[turn] = p.x + (size_t)(work.token + (is_real ? its : 0)) * columns;
      fb_keep(limit_[turn]);
      fb_keep(from_[turn]);
    }
    to_ = part * R::kPartBytes + R::offset(token, piece);
    fb_keep(copies_);
    fb_keep(column_);
    fb_keep(to_);
  }

  // Starts copying the next chunk, if there is one, to a stage.
  __device__ __forceinline__ void next(fb_shared stage) {
    if (chunks_left_ > 0) {
      uint32_t column = column_;
      fb_shared to = stage + to_;
#pragma unroll 1
      for (uint32_t left = copies_; left > 0; left--) {
#pragma unroll
        for (uint32_t turn = 0; turn < kTurns; turn++) {
          const bool ok = column < limit_[turn];
          fb_cp_async16(to + turn * R::kTokensAtOnce * R::kPieces * 16,
                        from_[turn] + (ok ? column : 0), ok);
        }
        column += R::kPartsAtOnce * each_ * FB_TILE_COLS;
        to += R::kPartsAtOnce * R::kPartBytes;
      }
      chunks_left_ -= 1;
      within_ += R::kTiles;
      column_ += R::kColumns;
      if (within_ >= each_) { // on to the next part
        column_ -= (within_ - each_) * FB_TILE_COLS;
        within_ = 0;
      }
    }
    fb_cp_async_commit();
  }

private:
  using R = Ring<N>;
  static constexpr uint32_t kTurns = N / R::kTokensAtOnce;

  const fb_bf16 *from_[kTurns];
  uint32_t limit_[kTurns];
  uint32_t to_, column_, copies_, each_, within_, chunks_left_;
};

// Adds a tile of weights times its columns of activations, at `x`, to the sums.
template <int TYPE, int N>
__device__ __forceinline__ void multiply(float (&sums)[N / 8][4], const uint32_t (&a)[2][4],
                                         const TileScales &scales, fb_shared x) {
  const uint32_t ones[4] = {0x3f803f80u, 0x3f803f80u, 0x3f803f80u, 0x3f803f80u};
#pragma unroll
  for (int column = 0; column < N / 8; column++) {
    uint32_t b[4]; // two steps of 16 rows of K
    fb_ldmatrix_x4(b, x + column * 8 * Ring<N>::kPieces * 16);
    float(&sum)[4] = sums[column];
    if (!Tile<TYPE>::kScaled) {
      fb_mma_bf16(sum, a[0], b[0], b[1]);
      fb_mma_bf16(sum, a[1], b[2], b[3]);
      continue;
    }
    float part[4];
    fb_mma_bf16_first(part, a[0], b[0], b[1]);
    fb_mma_bf16(part, a[1], b[2], b[3]);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      sum[i] = __fmaf_rn(part[i], scales.d[i / 2], sum[i]);
    }
    if (Tile<TYPE>::kShifted) {
      // The sum of the activations, in every row.
      float total[4];
      fb_mma_bf16_first(total, ones, b[0], b[1]);
      fb_mma_bf16(total, ones, b[2], b[3]);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        sum[i] = __fmaf_rn(total[i], scales.m[i / 2], sum[i]);
      }
    }
  }
}

// A part's sums go to shared memory, or onto those of the warp's parts before it.
template <int N>
__device__ __forceinline__ void put_part(float *to, const float (&sums)[N / 8][4], bool is_first,
                                         uint32_t lane) {
#pragma unroll
  for (int column = 0; column < N / 8; column++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint32_t token = column * 8 + lane % 4 * 2 + i % 2, row = lane / 4 + i / 2 * 8;
      float &at = to[token * FB_GEMM_PITCH + row];
      at = is_first ? sums[column][i] : __fadd_rn(at, sums[column][i]);
    }
  }
}

// Sums the warp's parts of its 16 rows.
template <int TYPE, int N>
__device__ __forceinline__ void accumulate(const fb_gemm &p, const Work &work,
                                           Stream<TYPE, N> &stream, float *sums_at,
                                           fb_shared ring) {
  constexpr uint32_t kAhead = Stream<TYPE, N>::kAhead, kTiles = Ring<N>::kTiles;
  static_assert(kAhead % kTiles == 0, "a tile of a chunk has its registers");
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t chunked = (work.each + kTiles - 1) / kTiles * kTiles; // tiles of a part's chunks
  uint32_t stage_bytes = work.shares * Ring<N>::kPartBytes;
  // Where the lane's row of a matrix is in a stage. Its piece of another tile is found by flipping
  // bits, as pieces are turned round by that, too.
  uint32_t x_at = work.part * Ring<N>::kPartBytes + Ring<N>::offset(lane % 8, lane / 8);
  fb_shared last_stage = ring + (FB_GEMM_STAGES - 1) * stage_bytes;
  fb_shared stage = last_stage; // the one before the first
  fb_keep(stage_bytes);
  fb_keep(x_at);
  fb_keep(last_stage);
  Feed<N> feed(p, work);
#pragma unroll
  for (uint32_t chunk = 0; chunk < FB_GEMM_STAGES - 1; chunk++) {
    feed.next(ring + chunk * stage_bytes);
  }
  for (uint32_t turn = 0; turn < (N >= FB_GEMM_IN_TURN ? work.parts : 1); turn++) {
    if (turn > 0) {
      stream.begin_part(p, work, turn);
    }
    float sums[N / 8][4] = {};
    for (uint32_t base = 0; base < chunked; base += kAhead) {
      stream.from.advance(kAhead);
      unrolled<0, kAhead>([&](auto slot) {
        const uint32_t at = base + slot;
        if (slot % kTiles == 0) {
          if (slot > 0 && at >= chunked) {
            return false;
          }
          fb_cp_async_wait<FB_GEMM_STAGES - 2>();
          // This chunk is there for all, and all are done with the one before, whose stage is free.
          __syncthreads();
          feed.next(stage);
          stage = stage == last_stage ? stage - (FB_GEMM_STAGES - 1) * stage_bytes
                                      : stage + stage_bytes;
        }
        if (at < stream.count) {
          Tile<TYPE> &tile = stream.tiles[slot];
          uint32_t a[2][4];
          tile.step(0, a[0]);
          tile.step(1, a[1]);
          const TileScales scales = tile.scales();
          const bool is_more = at + kAhead < stream.loaded;
          // What is loaded must go to the registers where it is wanted a turn later: to move it there
          // would be to wait for it. So it is loaded when they are free, which those of packed types
          // are as soon as they are unpacked.
          if (Tile<TYPE>::kScaled && is_more) {
            tile.template load<slot>(stream.from);
          }
          multiply<TYPE, N>(sums, a, scales, stage + (x_at ^ slot % kTiles * 64));
          if (!Tile<TYPE>::kScaled && is_more) {
            tile.template load<slot>(stream.from);
          }
        }
        return true;
      });
    }
    if (work.shares > 1) {
      __syncthreads(); // all are done with the ring
    }
    put_part<N>(sums_at, sums, turn == 0, lane);
  }
  __syncthreads();
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
  const float *part = parts + (tile * count * N + token) * FB_GEMM_PITCH + row;
  float sum = part[0];
#pragma unroll
  for (uint32_t s = 1; s < FB_GEMM_WARPS; s++) {
    if (s < count) {
      sum = __fadd_rn(sum, part[s * N * FB_GEMM_PITCH]);
    }
  }
  return sum;
}

template <int TYPE, int EPILOGUE, int N> __device__ __forceinline__ void gemm(const fb_gemm &p) {
  FB_DYNAMIC_SHARED(shared);
  const uint32_t count = *p.count;
  Work work = find_work<N>(p);
  // Weights are on their way before anything is known of the step.
  Stream<TYPE, N> stream(p, work);
  if (work.token >= count) {
    return;
  }
  work.tokens = min(count - work.token, (uint32_t)N);
  // The results of several warps' parts take the ring's place; one warp adds to them as it goes.
  const uint32_t parts_at = work.shares > 1 ? 0 : FB_GEMM_STAGES * Ring<N>::kPartBytes;
  float *parts = (float *)(shared + parts_at); // [warp][token][FB_GEMM_PITCH]
  accumulate<TYPE, N>(p, work, stream, parts + threadIdx.x / 32 * N * FB_GEMM_PITCH,
                      fb_shared_at(shared));

  constexpr bool kPaired = EPILOGUE == QKV || EPILOGUE == SWIGLU;
  constexpr uint32_t kRows = kPaired ? FB_TILE_ROWS / 2 : FB_TILE_ROWS; // or pairs, of a tile
  const uint32_t rows = kPaired ? p.weight.rows / 2 : p.weight.rows;
  const uint32_t width = kRows * work.row_tiles; // a power of 2
  const uint32_t token_shift = 31 - __clz(width);
  for (uint32_t at = threadIdx.x; at < width * work.tokens; at += kThreads) {
    const uint32_t within = at & (width - 1), token = at >> token_shift;
    const uint32_t row = within % kRows, tile = within / kRows;
    const uint32_t out = work.first_tile * kRows + within;
    if (out >= rows) {
      continue;
    }
    const float first = total<N>(parts, tile, work.shares, token, row);
    if (EPILOGUE == STORE) {
      p.y32[(size_t)(work.token + token) * rows + out] = first;
    } else if (EPILOGUE == RESIDUAL) {
      float *y = p.y32 + (size_t)(work.token + token) * rows + out;
      *y = __fadd_rn(*y, first);
    } else {
      const float second = total<N>(parts, tile, work.shares, token, row + 8);
      EPILOGUE == QKV ? qkv(p, work.token + token, out, first, second)
                      : swiglu(p, work.token + token, out, first, second);
    }
  }
}

} // namespace

#define GEMM(type, TYPE, epilogue, EPILOGUE, n)                                                    \
  extern "C" __global__ void __launch_bounds__(kThreads, n == 64 ? 1 : 2)                          \
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
