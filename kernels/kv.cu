// Copies of KV blocks inside the cache.
#include "abi.h"
#include "primitives.cuh"

// A CTA copies one block of one layer, 16 bytes a thread and turn.
extern "C" __global__ void __launch_bounds__(256)
    forebay_kv_copy(const __grid_constant__ fb_kv_copy p) {
  const uint32_t *pair = p.pairs + blockIdx.x * 2;
  fb_bf16 *layer = p.kv + blockIdx.y * p.layer_elements;
  const uint4 *from = (const uint4 *)(layer + pair[0] * p.block_elements);
  uint4 *to = (uint4 *)(layer + pair[1] * p.block_elements);
  const uint64_t count = p.block_elements / 8; // a block's positions are 64, so 8 divides it
#pragma unroll 4
  for (uint64_t i = threadIdx.x; i < count; i += blockDim.x) {
    to[i] = from[i];
  }
}
