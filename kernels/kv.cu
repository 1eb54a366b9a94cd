// Copies of KV blocks inside the cache.
#include "abi.h"
#include "primitives.cuh"

// A CTA copies one block of one layer; a thread has several 16 bytes under way.
extern "C" __global__ void __launch_bounds__(256)
    forebay_kv_copy(const __grid_constant__ fb_kv_copy p) {
  constexpr uint32_t kAhead = 4;
  const uint32_t *pair = p.pairs + blockIdx.x * 2;
  fb_bf16 *layer = p.kv + blockIdx.y * p.layer_elements;
  const uint4 *from = (const uint4 *)(layer + pair[0] * p.block_elements);
  uint4 *to = (uint4 *)(layer + pair[1] * p.block_elements);
  const uint32_t count = (uint32_t)(p.block_elements / 8); // 8 divides a block's 64 positions
  for (uint32_t first = threadIdx.x; first < count; first += kAhead * blockDim.x) {
    uint4 values[kAhead];
#pragma unroll
    for (uint32_t i = 0; i < kAhead; i++) {
      const uint32_t at = first + i * blockDim.x;
      values[i] = at < count ? from[at] : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (uint32_t i = 0; i < kAhead; i++) {
      const uint32_t at = first + i * blockDim.x;
      if (at < count) {
        to[at] = values[i];
      }
    }
  }
}
