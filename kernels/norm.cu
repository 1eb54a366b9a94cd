// Root-mean-square norm of rows, f32 in, bf16 out.
#include "abi.h"
#include "primitives.cuh"

namespace {

constexpr int kThreads = 256;

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
  for (int warp = 1; warp < kThreads / 32; warp++) {
    sum = __fadd_rn(sum, warps[warp]);
  }
  return sum;
}

} // namespace

// A row a block. It is read twice, the second time from L1.
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
  float sum = 0;
  for (uint32_t at = threadIdx.x; at < fours; at += kThreads) {
    const float4 v = x[at];
    sum = __fmaf_rn(v.x, v.x, sum);
    sum = __fmaf_rn(v.y, v.y, sum);
    sum = __fmaf_rn(v.z, v.z, sum);
    sum = __fmaf_rn(v.w, v.w, sum);
  }
  const float mean = __fdiv_rn(block_sum(sum), (float)p.columns);
  const float scale = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, p.eps)));
  uint2 *y = (uint2 *)(p.y + (size_t)row * p.columns);
  for (uint32_t at = threadIdx.x; at < fours; at += kThreads) {
    const float4 v = x[at], w = weight[at];
    y[at] = make_uint2(fb_pack_bf16(__fmul_rn(__fmul_rn(v.x, scale), w.x),
                                    __fmul_rn(__fmul_rn(v.y, scale), w.y)),
                       fb_pack_bf16(__fmul_rn(__fmul_rn(v.z, scale), w.z),
                                    __fmul_rn(__fmul_rn(v.w, scale), w.w)));
  }
}
