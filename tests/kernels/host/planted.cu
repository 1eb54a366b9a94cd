// Kernels with one fault each, of the kinds that the host run is there to find, and the same kernel
// without one. Every block of 64 threads turns its 64 numbers by one place: out[i] = in[i + 1].
#include "../../../kernels/primitives.cuh"
#include "planted.h"

namespace {

constexpr uint32_t kThreads = 64;

__device__ uint32_t index() { return blockIdx.x * kThreads + threadIdx.x; }
__device__ uint32_t next() { return (threadIdx.x + 1) % kThreads; }

// Every fourth thread copies 16 bytes.
__device__ void start_copy(uint32_t *to, const uint32_t *from) {
  if (threadIdx.x % 4 == 0) {
    fb_cp_async16(to + threadIdx.x, from + blockIdx.x * kThreads + threadIdx.x, true);
  }
  fb_cp_async_commit();
}

} // namespace

extern "C" __global__ void forebay_planted_nothing(const __grid_constant__ fb_planted p) {
  FB_DYNAMIC_SHARED(shared);
  uint32_t *values = (uint32_t *)shared;
  start_copy(values, p.in);
  fb_cp_async_wait<0>();
  __syncthreads();
  p.out[index()] = values[next()];
}

extern "C" __global__ void forebay_planted_no_barrier(const __grid_constant__ fb_planted p) {
  FB_DYNAMIC_SHARED(shared);
  uint32_t *values = (uint32_t *)shared;
  values[threadIdx.x] = p.in[index()];
  p.out[index()] = values[next()];
}

// The first barrier is there, the one before the memory is used again is not.
extern "C" __global__ void forebay_planted_no_second_barrier(const __grid_constant__ fb_planted p) {
  FB_DYNAMIC_SHARED(shared);
  uint32_t *values = (uint32_t *)shared;
  values[threadIdx.x] = p.in[index()];
  __syncthreads();
  const uint32_t value = values[next()];
  values[threadIdx.x] = value;
  __syncthreads();
  p.out[index()] = values[threadIdx.x] == value ? value : 0;
}

// As within a warp: what lanes tell each other by way of memory needs one, too.
extern "C" __global__ void forebay_planted_no_syncwarp(const __grid_constant__ fb_planted p) {
  __shared__ uint32_t values[kThreads];
  values[threadIdx.x] = p.in[index()];
  const uint32_t within = threadIdx.x / 32 * 32 + next() % 32;
  const uint32_t value = values[within];
  __syncthreads();
  p.out[index()] = next() % 32 == 0 ? values[next()] : value;
}

extern "C" __global__ void forebay_planted_no_wait(const __grid_constant__ fb_planted p) {
  FB_DYNAMIC_SHARED(shared);
  uint32_t *values = (uint32_t *)shared;
  start_copy(values, p.in);
  __syncthreads();
  p.out[index()] = values[next()];
}

extern "C" __global__ void forebay_planted_wait_for_too_few(const __grid_constant__ fb_planted p) {
  FB_DYNAMIC_SHARED(shared);
  uint32_t *values = (uint32_t *)shared;
  start_copy(values, p.in);
  fb_cp_async_wait<1>();
  __syncthreads();
  p.out[index()] = values[next()];
}

// A thread's wait is for its own copies.
extern "C" __global__ void forebay_planted_wait_without_barrier(const __grid_constant__ fb_planted p) {
  FB_DYNAMIC_SHARED(shared);
  uint32_t *values = (uint32_t *)shared;
  start_copy(values, p.in);
  fb_cp_async_wait<0>();
  p.out[index()] = values[next()];
}

extern "C" __global__ void forebay_planted_copy_beyond_shared(const __grid_constant__ fb_planted p) {
  FB_DYNAMIC_SHARED(shared);
  uint32_t *values = (uint32_t *)shared + 4;
  start_copy(values, p.in);
  fb_cp_async_wait<0>();
  __syncthreads();
  p.out[index()] = values[next()];
}

extern "C" __global__ void forebay_planted_barrier_of_some(const __grid_constant__ fb_planted p) {
  if (threadIdx.x != 17) {
    __syncthreads();
  }
  p.out[index()] = p.in[blockIdx.x * kThreads + next()];
}

extern "C" __global__ void forebay_planted_two_barriers(const __grid_constant__ fb_planted p) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  p.out[index()] = p.in[blockIdx.x * kThreads + next()];
}

extern "C" __global__ void forebay_planted_shuffle_of_some(const __grid_constant__ fb_planted p) {
  uint32_t value = p.in[blockIdx.x * kThreads + next()];
  if (threadIdx.x % 32 != 5) {
    value = __shfl_sync(0xffffffffu, value, threadIdx.x % 32);
  }
  p.out[index()] = value;
}

// The mask says who takes part, and lane 5 is asked all the same.
extern "C" __global__ void forebay_planted_shuffle_from_outside(const __grid_constant__ fb_planted p) {
  uint32_t value = p.in[blockIdx.x * kThreads + next()];
  if (threadIdx.x % 32 != 5) {
    value += __shfl_sync(~(1u << 5), value, 5);
  }
  p.out[index()] = value;
}

extern "C" __global__ void forebay_planted_write_beyond(const __grid_constant__ fb_planted p) {
  p.out[index() + 1] = p.in[blockIdx.x * kThreads + next()];
}

extern "C" __global__ void forebay_planted_read_beyond(const __grid_constant__ fb_planted p) {
  const uint32_t value = p.in[index() + 1];
  p.out[index()] = next() == 0 ? p.in[blockIdx.x * kThreads] : value;
}

extern "C" __global__ void forebay_planted_write_before(const __grid_constant__ fb_planted p) {
  p.out[index()] = p.in[blockIdx.x * kThreads + next()];
  if (index() == 0) {
    p.out[-1] = 1;
  }
}

extern "C" __global__ void forebay_planted_shared_beyond(const __grid_constant__ fb_planted p) {
  FB_DYNAMIC_SHARED(shared);
  uint32_t *values = (uint32_t *)shared;
  values[threadIdx.x + 1] = p.in[index()];
  __syncthreads();
  p.out[index()] = values[next() + 1];
}

extern "C" __global__ void forebay_planted_nothing_written(const __grid_constant__ fb_planted p) {
  if (threadIdx.x != 63) {
    p.out[index()] = p.in[blockIdx.x * kThreads + next()];
  }
}

// Shared memory is what the last block left there.
extern "C" __global__ void forebay_planted_old_shared(const __grid_constant__ fb_planted p) {
  __shared__ uint32_t ready;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    ready = 1;
  }
  __syncthreads();
  p.out[index()] = ready == 1 ? p.in[blockIdx.x * kThreads + next()] : 0;
}

// Blocks come in no order: the flag is block 0's.
extern "C" __global__ void forebay_planted_order_of_blocks(const __grid_constant__ fb_planted p) {
  const uint32_t value = p.in[blockIdx.x * kThreads + next()];
  const bool is_early = blockIdx.x > 0 && p.out[index() - kThreads] == 0xffffffffu;
  p.out[index()] = is_early ? 0 : value;
}
