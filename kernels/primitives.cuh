// What the kernels need of the machine: every PTX instruction, behind a function.
//
// The same kernels are compiled as C++ for the CPU (FOREBAY_HOST), where each thread of a block is a
// fiber. There the bodies below call hooks of that runtime (tests/kernels/host), which also supplies
// threadIdx, __syncthreads, __shfl_*_sync and the like under their own names.
#pragma once

#include <stdint.h>

#ifdef FOREBAY_HOST

#include <math.h>
#include <string.h>

// Warp-wide: all 32 lanes of the calling warp must come here.
void fb_host_mma_m16n8k16(float d[4], const uint32_t a[4], const uint32_t b[2], const float c[4]);
void fb_host_ldmatrix(uint32_t *r, int count, bool trans, const void *row);
// Copies `src_bytes` of `bytes` and zeros for the rest, not before the wait for its group.
void fb_host_cp_async(void *dst, const void *src, int bytes, int src_bytes);
void fb_host_cp_async_commit();
void fb_host_cp_async_wait(int pending);
void *fb_host_dynamic_shared();

// A kernel's dynamic shared memory, as bytes.
#define FB_DYNAMIC_SHARED(name) unsigned char *name = (unsigned char *)fb_host_dynamic_shared()

#else

#include <cuda_runtime.h>

#define FB_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

__device__ __forceinline__ uint32_t fb_shared_address(const void *pointer) {
  return (uint32_t)__cvta_generic_to_shared(pointer);
}

#endif

// ---------------------------------------------------------------------------------------- numbers

// 2^x, flushed to 0 below 2^-126, within 2 units in the last place.
__device__ __forceinline__ float fb_exp2(float x) {
#ifdef FOREBAY_HOST
  const float y = exp2f(x);
  return y < 1.17549435e-38f ? 0.0f : y;
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// Two numbers rounded to bf16, to the nearest even; `lo` in the low half.
__device__ __forceinline__ uint32_t fb_pack_bf16(float lo, float hi) {
#ifdef FOREBAY_HOST
  uint32_t bits[2];
  const float values[2] = {lo, hi};
  memcpy(bits, values, 8);
  for (int i = 0; i < 2; i++) {
    const bool nan = (bits[i] & 0x7fffffffu) > 0x7f800000u;
    bits[i] = nan ? 0x7fffu : (bits[i] + 0x7fffu + (bits[i] >> 16 & 1)) >> 16;
  }
  return bits[0] | bits[1] << 16;
#else
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(hi), "f"(lo));
  return pair;
#endif
}

__device__ __forceinline__ uint16_t fb_to_bf16(float x) { return (uint16_t)fb_pack_bf16(x, 0); }

__device__ __forceinline__ float fb_from_bf16(uint16_t x) {
  return __uint_as_float((uint32_t)x << 16);
}

// A half-precision number, exactly.
__device__ __forceinline__ float fb_from_f16(uint16_t x) {
#ifdef FOREBAY_HOST
  const uint32_t sign = (uint32_t)(x & 0x8000) << 16, exponent = x >> 10 & 31, rest = x & 0x3ff;
  if (exponent == 0) {
    const float small = ldexpf((float)rest, -24);
    return sign ? -small : small;
  }
  const uint32_t bits = exponent == 31 ? 0xffu : exponent + 112;
  return __uint_as_float(sign | bits << 23 | rest << 13);
#else
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
#endif
}

// x & MASK | bits, as one instruction: with two constants a compiler makes two of it.
template <uint32_t MASK> __device__ __forceinline__ uint32_t fb_mask_or(uint32_t x, uint32_t bits) {
#ifdef FOREBAY_HOST
  return (x & MASK) | bits;
#else
  uint32_t y;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(y) : "r"(x), "n"(MASK), "r"(bits));
  return y;
#endif
}

// a + b for two pairs of bf16; used where the sum is exact.
__device__ __forceinline__ uint32_t fb_add_bf16x2(uint32_t a, uint32_t b) {
#ifdef FOREBAY_HOST
  return fb_pack_bf16(fb_from_bf16(a & 0xffff) + fb_from_bf16(b & 0xffff),
                      fb_from_bf16(a >> 16) + fb_from_bf16(b >> 16));
#else
  const uint32_t one = 0x3f803f80u; // sm_80 multiplies and adds pairs of bf16, and does not add them
  uint32_t sum;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(one), "r"(b));
  return sum;
#endif
}

// Bytes 2 pair and 2 pair + 1 of a word, each in the low byte of a half; the others are 0.
__device__ __forceinline__ uint32_t fb_spread_bytes(uint32_t word, int pair) {
#ifdef FOREBAY_HOST
  word >>= 16 * pair;
  return (word & 0xff) | (word >> 8 & 0xff) << 16;
#else
  return __byte_perm(word, 0, pair ? 0x4342 : 0x4140);
#endif
}

// ----------------------------------------------------------------------------------------- memory

// 16 bytes that are read once: past L1, and two neighbours of 128 bytes together into L2.
__device__ __forceinline__ uint4 fb_load_stream(const void *from) {
#ifdef FOREBAY_HOST
  uint4 v;
  memcpy(&v, from, 16);
  return v;
#else
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
#endif
}

// The same, 8 bytes.
__device__ __forceinline__ uint2 fb_load_stream8(const void *from) {
#ifdef FOREBAY_HOST
  uint2 v;
  memcpy(&v, from, 8);
  return v;
#else
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v2.u32 {%0, %1}, [%2];"
               : "=r"(v.x), "=r"(v.y)
               : "l"(from));
  return v;
#endif
}

// Starts copying 16 bytes to shared memory, or zeros when not `ok` (then nothing is read).
__device__ __forceinline__ void fb_cp_async16(void *to, const void *from, bool ok) {
#ifdef FOREBAY_HOST
  fb_host_cp_async(to, from, 16, ok ? 16 : 0);
#else
  const int bytes = ok ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(fb_shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
#endif
}

// Makes a group of the copies started since the last one.
__device__ __forceinline__ void fb_cp_async_commit() {
#ifdef FOREBAY_HOST
  fb_host_cp_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most PENDING of this thread's groups are under way.
template <int PENDING> __device__ __forceinline__ void fb_cp_async_wait() {
#ifdef FOREBAY_HOST
  fb_host_cp_async_wait(PENDING);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

// ------------------------------------------------------------------------------------------- warp

// c += a b, 16 x 16 times 16 x 8, bf16 with f32 sums.
__device__ __forceinline__ void fb_mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                            uint32_t b1) {
#ifdef FOREBAY_HOST
  const uint32_t b[2] = {b0, b1};
  fb_host_mma_m16n8k16(c, a, b, c);
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// Four matrices of 8 x 8 16-bit values; lane i names row i % 8 of matrix i / 8.
__device__ __forceinline__ void fb_ldmatrix_x4(uint32_t (&r)[4], const void *row) {
#ifdef FOREBAY_HOST
  fb_host_ldmatrix(r, 4, false, row);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(fb_shared_address(row))
               : "memory");
#endif
}

// The same, each transposed.
__device__ __forceinline__ void fb_ldmatrix_x4_trans(uint32_t (&r)[4], const void *row) {
#ifdef FOREBAY_HOST
  fb_host_ldmatrix(r, 4, true, row);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(fb_shared_address(row))
               : "memory");
#endif
}

__device__ __forceinline__ float fb_warp_max(float x) {
  for (int lanes = 16; lanes > 0; lanes >>= 1) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lanes));
  }
  return x;
}

// Every lane gets the sum of all, added in the same order whatever the lane.
__device__ __forceinline__ float fb_warp_sum(float x) {
  for (int lanes = 16; lanes > 0; lanes >>= 1) {
    x = __fadd_rn(x, __shfl_xor_sync(0xffffffffu, x, lanes));
  }
  return x;
}
