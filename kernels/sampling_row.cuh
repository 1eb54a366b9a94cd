// A row of logits as the sampler sees it: penalties on the way, the order of likelihood, weights,
// and the one loop that all passes over a row are.
#pragma once
#include "abi.h"
#include "primitives.cuh"

namespace {

constexpr uint32_t kThreads = 1024;
constexpr uint32_t kList = 4096;            // orders that fit the list
constexpr uint32_t kStep = kThreads * 4;    // tokens that a CTA looks at in a turn
constexpr uint32_t kChunkSteps = 4;         // turns whose tokens are one chunk of a draw
constexpr uint32_t kChunk = kStep * kChunkSteps;
constexpr uint32_t kBiasMax = 300;          // as SamplingParams::LOGIT_BIAS_MAX
constexpr uint32_t kRankLow = 960;          // of the stripes' maxima: some 2850 tokens reach it
constexpr uint32_t kRankTopK = 512;         // below it a stripe's maximum is a good bound of top-k
constexpr uint64_t kNone = ~0ull;           // after every order
constexpr uint32_t kAhead = 4;              // loads of a thread under way in a pass
constexpr uint32_t kAll = 0xffffffffu;      // lanes
constexpr float kLog2E = 1.44269504f;
static_assert(kList == 4 * kThreads, "a list is added up by four a thread");

// How a pass sees logits.
struct Penalties {
  bool any;
  bool plain; // none, and 16-byte loads are possible
  float repetition;
  float inverse; // 1 / repetition
  float frequency;
  float presence;
};

// A row of logits.
struct Row {
  float *logits;
  uint32_t *counts; // the slot's
  uint32_t vocab;
  uint32_t id_bits;
  const Penalties &penalties;
};

// How logits become weights.
struct Scale {
  float max;
  float factor;
};

// logit / repetition, rounded once: a quotient, and its remainder's. (A division would be a call.)
__device__ float divide(float logit, const Row &row) {
  const float quotient = __fmul_rn(logit, row.penalties.inverse);
  const float rest = __fmaf_rn(-quotient, row.penalties.repetition, logit);
  return fabsf(quotient) < INFINITY ? __fmaf_rn(rest, row.penalties.inverse, quotient) : quotient;
}

__device__ float penalise(const Row &row, float logit, uint32_t count) {
  if (count == 0) {
    return logit;
  }
  const float scaled = logit > 0 ? divide(logit, row) : __fmul_rn(logit, row.penalties.repetition);
  const uint32_t output = count & 0x7fffffffu;
  if (output == 0) {
    return scaled;
  }
  const float once = row.penalties.presence;
  return __fsub_rn(scaled, __fadd_rn(__fmul_rn(row.penalties.frequency, (float)output), once));
}

__device__ float logit_at(const Row &row, uint32_t token) {
  const float logit = row.logits[token];
  return row.penalties.any ? penalise(row, logit, row.counts[token]) : logit;
}

// A token's place in the order of likelihood; kNone for a logit that is no number.
__device__ uint64_t order_of(const Row &row, float logit, uint32_t token) {
  const uint32_t bits = __float_as_uint(__fadd_rn(logit, 0.0f)); // one zero
  const uint32_t rising = bits >> 31 ? ~bits : bits | 0x80000000u;
  return logit == logit ? (uint64_t)~rising << row.id_bits | token : kNone;
}

__device__ float logit_of(const Row &row, uint64_t order) {
  const uint32_t rising = ~(uint32_t)(order >> row.id_bits);
  return __uint_as_float(rising >> 31 ? rising & 0x7fffffffu : ~rising);
}

__device__ uint32_t token_of(const Row &row, uint64_t order) {
  return (uint32_t)order & ((1u << row.id_bits) - 1);
}

// The last order of all tokens with this logit.
__device__ uint64_t last_order(const Row &row, float logit) {
  return order_of(row, logit, (1u << row.id_bits) - 1);
}

__device__ float weight(const Scale &scale, float logit) {
  const float power = fb_exp2(__fmul_rn(__fsub_rn(logit, scale.max), scale.factor));
  return logit <= scale.max ? power : 0;
}

// A weight of at most 1 in units of 2^-44.
__device__ uint64_t to_units(float weight) { return (uint64_t)(weight * 0x1p44f); }

// An order taken apart, which passes compare with faster.
struct Bound {
  float logit;
  uint32_t token;
  __device__ bool reaches(float its_logit, uint32_t its_token) const {
    // No && and ||: a branch would cost more than it saves.
    return (its_logit > logit) | ((its_logit == logit) & (its_token <= token));
  }
};

__device__ Bound bound_of(const Row &row, uint64_t order) {
  const float logit = logit_of(row, order);
  // An order between tokens may say minus zero, which all zeros are before.
  return {logit, __float_as_uint(logit) == 0x80000000u ? FB_NONE : token_of(row, order)};
}

// Calls look(first id, four logits) for all tokens, the same number of times in every thread, with
// kAhead loads under way if the row is plain. Logits beyond the vocabulary are no numbers.
template <typename Look>
__device__ void for_each_four(const Row &row, Look look) {
  const uint32_t own = threadIdx.x * 4, vocab = row.vocab;
  const float *from = row.logits;
  if (row.penalties.plain) {
#pragma unroll 1
    for (uint32_t base = 0; base < vocab; base += kAhead * kStep) {
      float4 values[kAhead];
#pragma unroll
      for (uint32_t i = 0; i < kAhead; i++) {
        const uint32_t first = base + i * kStep + own;
        values[i] = first < vocab ? *(const float4 *)(from + first)
                                  : make_float4(NAN, NAN, NAN, NAN);
      }
#pragma unroll
      for (uint32_t i = 0; i < kAhead; i++) {
        const float logits[4] = {values[i].x, values[i].y, values[i].z, values[i].w};
        look(base + i * kStep + own, logits);
      }
    }
    return;
  }
#pragma unroll 1
  for (uint32_t base = 0; base < vocab; base += kStep) {
    float logits[4];
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) {
      const uint32_t token = base + own + i;
      logits[i] = token < vocab ? logit_at(row, token) : NAN;
    }
    look(base + own, logits);
  }
}

} // namespace
