// Choosing tokens: a CTA a row of logits, with the semantics of src/device/cpu/sample.
//
// Every filter keeps a prefix of the tokens in order of likelihood (ties: lowest id first). That
// order is one integer, `order_of`: the logit's bits made monotone, then the id. A filter is the
// largest order that it keeps, and finding it is a search: passes over the row count what lies at
// or before a few pivots, until what is left between two fits a list in shared memory, which is
// sorted and added up. First pivots come from the 1024 largest logits of the threads' stripes.
//
// Weights are 2^((logit - max) x factor) as integers, in units of 2^-44: sums are exact, so no
// order of adding can change a choice.
#include "sampling_search.cuh"

namespace {

// As src/device/cpu/sample: a bijection of 64 bits.
__device__ uint64_t mix(uint64_t bits) {
  bits = (bits ^ bits >> 30) * 0xbf58476d1ce4e5b9ull;
  bits = (bits ^ bits >> 27) * 0x94d049bb133111ebull;
  return bits ^ bits >> 31;
}

// uniform(seed, position) of src/device/cpu/sample, times 2^53.
__device__ uint64_t uniform(uint64_t seed, uint32_t position) {
  const uint64_t key = mix(seed ^ 0x9e3779b97f4a7c15ull);
  return mix(key ^ mix(position * 0xd1b54a32d192ed03ull)) >> 11;
}

// Draws among tokens up to the cut and no lighter than `least`, in order of id.
struct Draw {
  Scale scale;
  float least; // weight
  uint64_t uniform;
  __device__ uint64_t units(float logit) const {
    const float its = weight(scale, logit);
    return its >= least ? to_units(its) : 0;
  }
  __device__ uint64_t target(uint64_t total) const {
    return __umul64hi(uniform << 11, total) + 1;
  }
};

// From the list, whose first `count` tokens are those that the filters keep.
__device__ uint32_t draw_listed(Shared &shared, const Row &row, const Draw &draw, uint32_t count) {
  for (uint32_t i = threadIdx.x; i < count; i += kThreads) {
    const uint64_t order = shared.list[i];
    const float logit = logit_of(row, order);
    shared.list[i] = (uint64_t)token_of(row, order) << 32 | __float_as_uint(logit);
  }
  sort_list(shared, count);
  find_crossing<4>(
      shared, count,
      [&](uint32_t at) { return draw.units(__uint_as_float((uint32_t)shared.list[at])); },
      [&](uint64_t total) { return draw.target(total); });
  return shared.found < count ? (uint32_t)(shared.list[shared.found] >> 32) : FB_NONE;
}

// From the whole row: sums of chunks first, each warp's part on its own; then within a chunk.
__device__ uint32_t draw_row(Shared &shared, const Row &row, const Draw &draw, uint64_t last) {
  const Bound bound = bound_of(row, last);
  const auto units = [&](float logit, uint32_t token) {
    return bound.reaches(logit, token) ? draw.units(logit) : 0;
  };
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t steps = 0;
  uint64_t sum = 0;
  const auto store = [&](uint32_t chunk) {
    sum = warp_sum(sum);
    if (lane == 0 && chunk < kList / 32) {
      shared.list[chunk * 32 + warp] = sum;
    }
    sum = 0;
  };
  __syncthreads(); // the list is nobody's now
  for_each_four(row, [&](uint32_t first, const float(&logits)[4]) {
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) {
      sum += units(logits[i], first + i);
    }
    steps++;
    if (steps % kChunkSteps == 0) {
      store(steps / kChunkSteps - 1);
    }
  });
  if (steps % kChunkSteps != 0) {
    store(steps / kChunkSteps);
  }
  __syncthreads();
  const uint32_t chunks = min((row.vocab + kChunk - 1) / kChunk, kList / 32);
  uint64_t target = 0;
  find_crossing<1>(
      shared, chunks,
      [&](uint32_t chunk) {
        uint64_t all = 0;
        for (uint32_t i = 0; i < 32; i++) {
          all += shared.list[chunk * 32 + i];
        }
        return all;
      },
      [&](uint64_t total) { return target = draw.target(total); });
  if (shared.found == chunks) {
    return FB_NONE;
  }
  const uint32_t start = shared.found * kChunk;
  target -= shared.before;
  __syncthreads(); // everyone has read
  find_crossing<kChunk / kThreads>(
      shared, min(kChunk, row.vocab - start),
      [&](uint32_t at) { return units(logit_at(row, start + at), start + at); },
      [&](uint64_t) { return target; });
  return start + shared.found;
}

// The lowest id among the most likely; without a number above minus infinity the first of the first
// 64 tokens that is minus infinity, or 0.
__device__ uint32_t greedy(const Row &row, uint64_t most_likely) {
  if (most_likely != kNone) {
    return token_of(row, most_likely);
  }
  for (uint32_t token = 0; token < min(row.vocab, 64u); token++) {
    if (logit_at(row, token) == -INFINITY) {
      return token;
    }
  }
  return 0;
}

__device__ void find_raw(Shared &shared, const Row &row, uint32_t alternatives,
                         fb_sampled &result) {
  float least;
  const uint64_t most_likely = find_most_likely(shared, row, least);
  const float max = most_likely == kNone ? -INFINITY : logit_of(row, most_likely);
  const uint32_t top = min(min(alternatives, (uint32_t)FB_TOP_MAX), row.vocab);
  const Guesses guesses = guess(shared, top, least);
  const Scale scale = {max, kLog2E};
  const uint64_t all = last_order(row, -INFINITY);
  if (threadIdx.x == 0) {
    shared.search = {scale, least, {all, all}, 0, 0, 0, 0, 0, 0};
  }
  __syncthreads();
  const bool is_finite = fabsf(max) < INFINITY; // infinity less infinity would be no number
  if (is_finite) {
    measure<true>(shared, row);
  } else {
    measure<false>(shared, row);
  }
  const float sum = is_finite ? (float)shared.mass[0] * 0x1p-44f : 0;
  const uint32_t numbers = shared.count[0];
  const Raw raw = {max, sum > 0 ? logf(sum) : 0};
  const uint32_t count = min(top, numbers);
  __syncthreads();
  if (count > 0) {
    keep_most_likely(shared, row, scale, guesses, count);
    if (threadIdx.x < count) {
      const uint64_t order = shared.list[threadIdx.x];
      result.top_tokens[threadIdx.x] = token_of(row, order);
      result.top_logprobs[threadIdx.x] = raw.logprob(logit_of(row, order));
    }
  }
  if (threadIdx.x == 0) {
    result.top_count = count;
    shared.raw = raw;
  }
  __syncthreads();
}

// Puts penalised and biased logits in place of the raw ones, which are kept in shared memory. So
// that passes do not penalise them again, their counts are set aside meanwhile.
__device__ void set_biases(Shared &shared, const Row &row, const fb_bias *biases, uint32_t count) {
  for (uint32_t i = threadIdx.x; i < count; i += kThreads) {
    const uint32_t token = biases[i].token;
    bool is_first = token < row.vocab;
    for (uint32_t j = 0; j < i; j++) {
      is_first = is_first && biases[j].token != token;
    }
    if (!is_first) {
      continue;
    }
    float logit = row.logits[token];
    shared.bias_raw[i] = logit;
    if (row.penalties.any) {
      shared.bias_counts[i] = row.counts[token];
      logit = penalise(row, logit, row.counts[token]);
      row.counts[token] = 0;
    }
    for (uint32_t j = i; j < count; j++) {
      logit = biases[j].token == token ? __fadd_rn(logit, biases[j].bias) : logit;
    }
    row.logits[token] = logit;
  }
}

// Brings counts back, and gives the token's raw logit.
__device__ float end_biases(Shared &shared, const Row &row, const fb_bias *biases, uint32_t count,
                            uint32_t token) {
  float raw = row.logits[token];
  for (uint32_t i = count; i-- > 0;) {
    raw = biases[i].token == token ? shared.bias_raw[i] : raw; // the first entry's in the end
  }
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < count && row.penalties.any; i += kThreads) {
    const uint32_t its = biases[i].token;
    bool is_first = its < row.vocab;
    for (uint32_t j = 0; j < i; j++) {
      is_first = is_first && biases[j].token != its;
    }
    if (is_first) {
      row.counts[its] = shared.bias_counts[i];
    }
  }
  __syncthreads();
  return raw;
}

__device__ uint32_t choose(Shared &shared, const Row &row, const fb_slot &slot,
                           uint32_t position) {
  float least;
  const uint64_t most_likely = find_most_likely(shared, row, least);
  const float max = most_likely == kNone ? -INFINITY : logit_of(row, most_likely);
  if (!(fabsf(max) < INFINITY) || !(slot.temperature > 0)) {
    return greedy(row, most_likely);
  }
  // An infinite factor would turn the most likely token's 0 into no number.
  const Scale scale = {max, fminf(__fdiv_rn(kLog2E, slot.temperature), 1e30f)};
  const float least_weight = slot.min_p > 0 ? fminf(slot.min_p, 1) : 0;
  const Draw draw = {scale, least_weight, uniform(slot.seed, position)};
  const bool has_top_k = slot.top_k > 0 && slot.top_k < row.vocab;
  Cut cut = {last_order(row, -INFINITY), 0};
  if (has_top_k || slot.top_p < 1) {
    cut = find_cut(shared, row, scale, slot, guess(shared, slot.top_k, least));
  }
  __syncthreads();
  const uint32_t token = cut.listed > 0 ? draw_listed(shared, row, draw, cut.listed)
                                        : draw_row(shared, row, draw, cut.last);
  return token < row.vocab ? token : token_of(row, most_likely);
}

} // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    forebay_sample(const __grid_constant__ fb_sample p) {
  __shared__ Shared shared;
  const uint32_t index = blockIdx.x;
  if (index >= p.step->sampled || p.sampled_rows[index] == FB_NONE) {
    return;
  }
  const fb_row &step_row = p.rows[p.sampled_rows[index]];
  const fb_slot &slot = p.slots[step_row.slot];
  fb_sampled &result = p.results[index];
  const Row row = {p.logits + (size_t)index * p.vocab,
                   p.counts + (size_t)step_row.slot * p.vocab, p.vocab,
                   32u - __clz(p.vocab - 1), shared.penalties};
  const bool aligned = p.vocab % 4 == 0;
  if (threadIdx.x == 0) {
    shared.penalties = {false,
                        aligned,
                        slot.repetition_penalty,
                        __frcp_rn(slot.repetition_penalty),
                        slot.frequency_penalty,
                        slot.presence_penalty};
  }
  __syncthreads();
  if (slot.logprobs > 0) {
    find_raw(shared, row, slot.logprobs - 1, result);
  }
  if (threadIdx.x == 0) {
    const bool any = slot.repetition_penalty != 1 || slot.frequency_penalty != 0 ||
                     slot.presence_penalty != 0;
    shared.penalties.any = any;
    shared.penalties.plain = aligned && !any;
  }
  __syncthreads();
  const fb_bias *biases = p.biases + slot.bias_start;
  const uint32_t bias_count = min(slot.bias_count, kBiasMax);
  set_biases(shared, row, biases, bias_count);
  __syncthreads();
  const uint32_t token = choose(shared, row, slot, step_row.position + step_row.token_count);
  const float logit = end_biases(shared, row, biases, bias_count, token);
  if (threadIdx.x == 0) {
    result.token = token;
    result.logprob = slot.logprobs > 0 ? shared.raw.logprob(logit) : 0;
    if (slot.logprobs == 0) {
      result.top_count = 0;
    }
    const uint32_t count = row.counts[token];
    row.counts[token] = (count & 0x7fffffffu) < 0x7fffffffu ? count + 1 : count;
    p.last_tokens[step_row.slot] = token;
  }
}

extern "C" __global__ void __launch_bounds__(256)
    forebay_count(const __grid_constant__ fb_count p) {
  if (blockIdx.x >= p.setups_count) {
    return;
  }
  const fb_slot_setup setup = p.setups[blockIdx.x];
  uint32_t *counts = p.counts + (size_t)setup.slot * p.vocab;
  for (uint32_t i = threadIdx.x; i < p.vocab; i += blockDim.x) {
    counts[i] = 0;
  }
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < setup.history_count; i += blockDim.x) {
    const uint32_t token = p.history[setup.history_start + i];
    if (token < p.vocab) {
      if (i < setup.history_prompt_count) {
        atomicOr(&counts[token], 0x80000000u);
      } else {
        atomicAdd(&counts[token], 1u);
      }
    }
  }
}
