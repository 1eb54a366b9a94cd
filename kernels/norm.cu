// Root-mean-square norm of rows, f32 in, bf16 out.
#include "abi.h"
#include "primitives.cuh"

namespace {

constexpr uint32_t kThreads = 256;
constexpr uint32_t kKept = 4; // float4 of a row that a thread keeps

// The sum over a block, the same for every thread: lanes, then warps, in a fixed tree.
__device__ float block_sum(float x) {
  __shared__ float warps[kThreads / 32];
  x = fb_warp_sum(x);
  if (threadIdx.x % 32 == 0) {
    warps[threadIdx.x / 32] = x;
  }
  __syncthreads();
  float sum = warps[0];
#pragma unroll
  for (uint32_t warp = 1; warp < kThreads / 32; warp++) {
    sum = __fadd_rn(sum, warps[warp]);
  }
  return sum;
}

__device__ __forceinline__ float add_squares(float4 v, float sum) {
  sum = __fmaf_rn(v.x, v.x, sum);
  sum = __fmaf_rn(v.y, v.y, sum);
  sum = __fmaf_rn(v.z, v.z, sum);
  return __fmaf_rn(v.w, v.w, sum);
}

__device__ __forceinline__ uint2 scaled(float4 v, float scale, float4 w) {
  return make_uint2(fb_pack_bf16(__fmul_rn(__fmul_rn(v.x, scale), w.x),
                                 __fmul_rn(__fmul_rn(v.y, scale), w.y)),
                    fb_pack_bf16(__fmul_rn(__fmul_rn(v.z, scale), w.z),
                                 __fmul_rn(__fmul_rn(v.w, scale), w.w)));
}

} // namespace

// A row a block. Columns up to kKept x 1024 stay in registers from the first reading to the second;
// weights are read before the sum is known, as a step waits for this kernel twice a layer.
extern "C" __global__ void __launch_bounds__(kThreads)
    forebay_rmsnorm(const __grid_constant__ fb_rmsnorm p) {
  const uint32_t row = blockIdx.x;
  const uint32_t from = row >= *p.count ? FB_NONE : p.gather ? p.gather[row] : row;
  if (from == FB_NONE) {
    return;
  }
  const float4 *x = (const float4 *)(p.x + (size_t)from * p.columns);
  const float4 *weight = (const float4 *)p.weight;
  const uint32_t fours = p.columns / 4;
  float4 values[kKept], weights[kKept];
#pragma unroll
  for (uint32_t i = 0; i < kKept; i++) {
    const uint32_t at = threadIdx.x + i * kThreads;
    const bool is_there = at < fours;
    values[i] = is_there ? x[at] : make_float4(0, 0, 0, 0);
    weights[i] = is_there ? weight[at] : make_float4(0, 0, 0, 0);
  }
  float sum = 0;
#pragma unroll
  for (uint32_t i = 0; i < kKept; i++) {
    sum = add_squares(values[i], sum);
  }
  for (uint32_t at = threadIdx.x + kKept * kThreads; at < fours; at += kThreads) {
    sum = add_squares(x[at], sum);
  }
  const float mean = __fdiv_rn(block_sum(sum), (float)p.columns);
  const float scale = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, p.eps)));
  uint2 *y = (uint2 *)(p.y + (size_t)row * p.columns);
#pragma unroll
  for (uint32_t i = 0; i < kKept; i++) {
    const uint32_t at = threadIdx.x + i * kThreads;
    if (at < fours) {
      y[at] = scaled(values[i], scale, weights[i]);
    }
  }
  for (uint32_t at = threadIdx.x + kKept * kThreads; at < fours; at += kThreads) {
    y[at] = scaled(x[at], scale, weight[at]);
  }
}
