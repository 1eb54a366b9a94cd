// CUDA as a C++ compiler for the CPU sees it: included before each kernels/*.cu of the host run.
//
// Each thread of a block is a fiber, one running at a time, in an order shuffled by a seed; a fiber
// goes on until it meets others: at __syncthreads, or at anything that a warp does together.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define __align__(bytes) __attribute__((aligned(bytes)))
// In a section of its own, so that the host run can poison it before each block.
#define __shared__ static __attribute__((section("fb_shared")))

struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(8) int2 { int32_t x, y; };
struct alignas(16) int4 { int32_t x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline int2 make_int2(int32_t x, int32_t y) { return {x, y}; }
inline int4 make_int4(int32_t x, int32_t y, int32_t z, int32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct dim3 {
  uint32_t x = 1, y = 1, z = 1;
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

// What a warp does together. Each lane gives 8 bytes and gets 8.
enum fb_host_shuffle_kind { FB_SHUFFLE_XOR, FB_SHUFFLE_INDEX, FB_SHUFFLE_UP, FB_SHUFFLE_DOWN };
uint64_t fb_host_shuffle(fb_host_shuffle_kind kind, uint32_t mask, uint64_t value, uint32_t by);
uint32_t fb_host_ballot(uint32_t mask, bool value);
void fb_host_syncwarp(uint32_t mask);
void fb_host_syncthreads(int line);

template <typename T>
inline T fb_host_shuffled(fb_host_shuffle_kind kind, uint32_t mask, T value, uint32_t by) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = fb_host_shuffle(kind, mask, bits, by);
  memcpy(&value, &bits, sizeof(T));
  return value;
}
template <typename T> inline T __shfl_xor_sync(uint32_t mask, T value, uint32_t by) {
  return fb_host_shuffled(FB_SHUFFLE_XOR, mask, value, by);
}
template <typename T> inline T __shfl_sync(uint32_t mask, T value, uint32_t lane) {
  return fb_host_shuffled(FB_SHUFFLE_INDEX, mask, value, lane);
}
template <typename T> inline T __shfl_up_sync(uint32_t mask, T value, uint32_t by) {
  return fb_host_shuffled(FB_SHUFFLE_UP, mask, value, by);
}
template <typename T> inline T __shfl_down_sync(uint32_t mask, T value, uint32_t by) {
  return fb_host_shuffled(FB_SHUFFLE_DOWN, mask, value, by);
}
inline uint32_t __ballot_sync(uint32_t mask, bool value) { return fb_host_ballot(mask, value); }
inline int __any_sync(uint32_t mask, bool value) { return fb_host_ballot(mask, value) != 0; }
inline void __syncwarp(uint32_t mask = 0xffffffffu) { fb_host_syncwarp(mask); }
// All of a block meet at the same one, which its line tells.
inline void __syncthreads(int line = __builtin_LINE()) { fb_host_syncthreads(line); }

// Compiled with -ffp-contract=off, so that nothing but these fuses.
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1 / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __frsqrt_rn(float a) { return (float)(1 / sqrt((double)a)); }
inline uint32_t __float_as_uint(float a) {
  uint32_t bits;
  memcpy(&bits, &a, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float a;
  memcpy(&a, &bits, 4);
  return a;
}
inline uint32_t __clz(uint32_t a) { return a == 0 ? 32 : (uint32_t)__builtin_clz(a); }
inline uint32_t __popc(uint32_t a) { return (uint32_t)__builtin_popcount(a); }
inline uint32_t __ffs(uint32_t a) { return (uint32_t)__builtin_ffs((int)a); }
inline uint64_t __umul64hi(uint64_t a, uint64_t b) {
  return (uint64_t)((unsigned __int128)a * b >> 64);
}
template <typename A, typename B> inline std::common_type_t<A, B> min(A a, B b) {
  const std::common_type_t<A, B> x = a, y = b;
  return y < x ? y : x;
}
template <typename A, typename B> inline std::common_type_t<A, B> max(A a, B b) {
  const std::common_type_t<A, B> x = a, y = b;
  return x < y ? y : x;
}
// One fiber runs at a time. Not for floats: the order would change sums.
template <typename T, typename F> inline T fb_host_atomic(T *at, F change) {
  static_assert(std::is_integral<T>::value, "no float is changed atomically");
  const T before = *at;
  *at = change(before);
  return before;
}
template <typename T> inline T atomicAdd(T *at, T value) {
  return fb_host_atomic(at, [=](T a) { return (T)(a + value); });
}
template <typename T> inline T atomicOr(T *at, T value) {
  return fb_host_atomic(at, [=](T a) { return (T)(a | value); });
}
template <typename T> inline T atomicMax(T *at, T value) {
  return fb_host_atomic(at, [=](T a) { return a < value ? value : a; });
}
template <typename T> inline T atomicMin(T *at, T value) {
  return fb_host_atomic(at, [=](T a) { return value < a ? value : a; });
}
