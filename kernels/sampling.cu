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
#include "abi.h"
#include "primitives.cuh"

namespace {

constexpr uint32_t kThreads = 1024;
constexpr uint32_t kList = 4096;            // orders that fit the list
constexpr uint32_t kStep = kThreads * 4;    // tokens that a CTA looks at in a turn
constexpr uint32_t kChunkSteps = 4;         // turns whose tokens are one chunk of a draw
constexpr uint32_t kChunk = kStep * kChunkSteps;
constexpr uint32_t kBiasMax = 300;          // as SamplingParams::LOGIT_BIAS_MAX
constexpr uint32_t kRankLow = 960;          // of the stripes' maxima: about 2850 tokens lie before it
constexpr uint32_t kRankTopK = 512;         // below it a stripe's maximum is a good bound of top-k
constexpr uint64_t kNone = ~0ull;           // after every order
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

// Log-probabilities in the raw distribution: what to subtract from a logit, and the alternatives.
struct Raw {
  float max;
  float log_sum;
  __device__ float logprob(float logit) const { return (logit - max) - log_sum; }
};

// How logits become weights.
struct Scale {
  float max;
  float factor;
};

// A search for a cut: the last order with which the running count (or mass) reaches a target.
struct Search {
  Scale scale;
  float least; // the smallest logit above minus infinity
  uint64_t pivots[2];
  // The cut lies between these.
  uint64_t start, end;
  uint64_t before; // what tokens before `start` have
  uint32_t before_count;
  uint32_t end_count; // tokens up to `end`
  uint64_t target;
};

// What a filter keeps.
struct Cut {
  uint64_t last;   // order of the least likely token kept
  uint32_t listed; // not 0: the list begins with exactly these tokens, in order
};

struct Shared {
  // What every thread knows, here to spare registers.
  Penalties penalties;
  Raw raw;
  uint64_t list[kList];      // orders, or sums of chunks
  uint64_t warps[kThreads / 32];
  uint64_t total;
  uint64_t warp_mass[2][kThreads / 32];
  uint32_t warp_count[2][kThreads / 32];
  uint64_t mass[2]; // of tokens up to each pivot
  uint32_t count[2];
  Search search;
  float minima[kThreads / 32];
  uint32_t listed;
  uint32_t found;            // index in the list
  uint64_t before;           // sum before it
  float bias_raw[kBiasMax];  // logits before penalties and bias
  uint32_t bias_counts[kBiasMax];
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
  return __fsub_rn(scaled, __fadd_rn(__fmul_rn(row.penalties.frequency, (float)output), row.penalties.presence));
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
template <uint32_t kAhead, typename Look>
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

__device__ uint64_t warp_sum(uint64_t value) {
#pragma unroll
  for (uint32_t distance = 16; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAll, value, distance);
  }
  return value;
}

// The sum of value over all threads before this one; shared.total: over all.
__device__ uint64_t sum_before(Shared &shared, uint64_t value) {
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint64_t sum = value;
#pragma unroll
  for (uint32_t distance = 1; distance < 32; distance *= 2) {
    const uint64_t other = __shfl_up_sync(kAll, sum, distance);
    sum += lane >= distance ? other : 0;
  }
  if (lane == 31) {
    shared.warps[warp] = sum;
  }
  __syncthreads();
  if (warp == 0) {
    const uint64_t own = shared.warps[lane];
    uint64_t warps = own;
#pragma unroll
    for (uint32_t distance = 1; distance < 32; distance *= 2) {
      const uint64_t other = __shfl_up_sync(kAll, warps, distance);
      warps += lane >= distance ? other : 0;
    }
    shared.warps[lane] = warps - own;
    if (lane == 31) {
      shared.total = warps;
    }
  }
  __syncthreads();
  return shared.warps[warp] + sum - value;
}

// Sorts the first `count` orders of the list (bitonic), the rest up to a power of two is kNone.
__device__ void sort_list(Shared &shared, uint32_t count) {
  uint32_t size = 2;
  while (size < count) {
    size *= 2;
  }
  for (uint32_t i = count + threadIdx.x; i < size; i += kThreads) {
    shared.list[i] = kNone;
  }
  __syncthreads();
  for (uint32_t run = 2; run <= size; run *= 2) {
    for (uint32_t distance = run / 2; distance > 0; distance /= 2) {
      for (uint32_t i = threadIdx.x; i < size / 2; i += kThreads) {
        const uint32_t low = 2 * i - (i & (distance - 1)), high = low + distance;
        const uint64_t a = shared.list[low], b = shared.list[high];
        if ((a > b) == ((low & run) == 0)) {
          shared.list[low] = b;
          shared.list[high] = a;
        }
      }
      __syncthreads();
    }
  }
}

// The first of `count` (at most 1024 x kEach) values with which the running sum reaches what
// target_of(sum of all) says, in shared.found (`count` if none does), and the sum before it.
template <uint32_t kEach, typename Value, typename Target>
__device__ void find_crossing(Shared &shared, uint32_t count, Value value, Target target_of) {
  const uint32_t first = threadIdx.x * kEach, end = min(first + kEach, count);
  uint64_t sum = 0;
  for (uint32_t at = first; at < end; at++) {
    sum += value(at);
  }
  uint64_t before = sum_before(shared, sum);
  const uint64_t target = target_of(shared.total);
  if (threadIdx.x == 0) {
    shared.found = count;
  }
  __syncthreads();
  if (before < target && before + sum >= target) {
    uint32_t at = first;
    for (uint64_t its = value(at); before + its < target; its = value(at)) {
      before += its;
      at++;
    }
    shared.found = at;
    shared.before = before;
  }
  __syncthreads();
}

// The smallest number that is at least fraction x total, and at least 1. Exact; but where the most
// likely token alone is surely enough, 1.
__device__ uint64_t part_of(uint64_t total, float fraction) {
  if (!(fraction > 0x1p-40f)) {
    return 1; // total is below 2^64 units, so the part below 2^24, and a weight of 1 is 2^44
  }
  if (fraction >= 1) {
    return total;
  }
  const uint32_t bits = __float_as_uint(fraction);
  const uint64_t mantissa = (bits & 0x7fffffu) | 0x800000u;
  const uint32_t shift = 150 - (bits >> 23); // 24 to 63
  const uint64_t low = total * mantissa, high = __umul64hi(total, mantissa);
  const uint64_t whole = high << (64 - shift) | low >> shift;
  return whole + (low << (64 - shift) != 0 ? 1 : 0);
}

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

// The most likely token's order (kNone without a number above minus infinity), to all threads; the
// smallest number above minus infinity in `least`; the stripes' maxima in the list, unsorted.
__device__ uint64_t find_most_likely(Shared &shared, const Row &row, float &least) {
  float best = -INFINITY, low = INFINITY;
  uint32_t token = FB_NONE;
  for_each_four<4>(row, [&](uint32_t first, const float(&logits)[4]) {
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) {
      const bool is_more = logits[i] > best; // the lowest id among equals
      best = is_more ? logits[i] : best;
      token = is_more ? first + i : token;
      low = logits[i] > -INFINITY ? fminf(low, logits[i]) : low;
    }
  });
  const uint64_t own = token == FB_NONE ? kNone : order_of(row, best, token);
  uint64_t order = own;
#pragma unroll
  for (uint32_t distance = 16; distance > 0; distance /= 2) {
    order = min(order, __shfl_xor_sync(kAll, order, distance));
    low = fminf(low, __shfl_xor_sync(kAll, low, distance));
  }
  __syncthreads(); // the list is nobody's now
  shared.list[threadIdx.x] = own;
  if (threadIdx.x % 32 == 0) {
    shared.warps[threadIdx.x / 32] = order;
    shared.minima[threadIdx.x / 32] = low;
  }
  __syncthreads();
  order = shared.warps[0];
  low = shared.minima[0];
  for (uint32_t i = 1; i < kThreads / 32; i++) {
    order = min(order, shared.warps[i]);
    low = fminf(low, shared.minima[i]);
  }
  least = low;
  return order;
}

// Counts and masses of all tokens up to each of the search's two rising pivots.
template <bool kByMass> __device__ void measure(Shared &shared, const Row &row) {
  const Scale scale = shared.search.scale;
  const Bound bounds[2] = {bound_of(row, shared.search.pivots[0]),
                           bound_of(row, shared.search.pivots[1])};
  uint64_t mass[2] = {};
  uint32_t count[2] = {};
  for_each_four<4>(row, [&](uint32_t first, const float(&logits)[4]) {
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) {
      const uint64_t units = kByMass ? to_units(weight(scale, logits[i])) : 1;
#pragma unroll
      for (uint32_t j = 0; j < 2; j++) {
        const bool reached = bounds[j].reaches(logits[i], first + i);
        count[j] += reached ? 1 : 0;
        mass[j] += reached ? units : 0;
      }
    }
  });
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (uint32_t j = 0; j < 2; j++) {
    const uint64_t its_mass = warp_sum(mass[j]);
    const uint32_t its_count = (uint32_t)warp_sum(count[j]);
    if (lane == 0) {
      shared.warp_mass[j][warp] = its_mass;
      shared.warp_count[j][warp] = its_count;
    }
  }
  __syncthreads();
  if (warp < 2) {
    const uint64_t its_mass = warp_sum(shared.warp_mass[warp][lane]);
    const uint32_t its_count = (uint32_t)warp_sum(shared.warp_count[warp][lane]);
    if (lane == 0) {
      shared.mass[warp] = its_mass;
      shared.count[warp] = its_count;
    }
  }
  __syncthreads();
}

// Collects the orders from start to end into the list; how many there are (the list is useless when
// more than it holds).
__device__ uint32_t gather(Shared &shared, const Row &row, uint64_t start, uint64_t end) {
  __syncthreads(); // the list is nobody's now
  if (threadIdx.x == 0) {
    shared.listed = 0;
  }
  __syncthreads();
  const float high = logit_of(row, start), low = logit_of(row, end);
  for_each_four<4>(row, [&](uint32_t first, const float(&logits)[4]) {
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) {
      if (!(logits[i] >= low && logits[i] <= high)) {
        continue; // nearly all of them
      }
      const uint64_t order = order_of(row, logits[i], first + i);
      if (order >= start && order <= end) {
        const uint32_t at = atomicAdd(&shared.listed, 1u);
        if (at < kList) {
          shared.list[at] = order;
        }
      }
    }
  });
  __syncthreads();
  return shared.listed;
}

// Narrows a search by what was measured at its pivots.
__device__ void narrow(Shared &shared) {
  Search &search = shared.search;
  for (uint32_t i = 0; i < 2; i++) {
    if (shared.mass[i] >= search.target) {
      search.end = search.pivots[i];
      search.end_count = shared.count[i];
      return;
    }
    search.start = search.pivots[i] + 1;
    search.before = shared.mass[i];
    search.before_count = shared.count[i];
  }
}

// Pivots at the thirds of a search: of the logits for the first few turns, which suits what models
// give, then of the orders, which ends for sure.
__device__ void divide_range(const Row &row, Search &search, uint32_t turn) {
  const float high = logit_of(row, search.start);
  const float low = fmaxf(logit_of(row, search.end), search.least);
  const float span = high - low;
  for (uint32_t i = 0; i < 2; i++) {
    uint64_t pivot = search.start + (search.end - search.start) / 3 * (i + 1);
    if (turn < 6 && span > 0 && span < INFINITY) {
      pivot = last_order(row, high - span * (0.333333f * (float)(i + 1)));
      pivot = min(max(pivot, search.start), search.end - 1);
    }
    search.pivots[i] = pivot;
  }
}

// Narrows the search until what is left fits the list. The first pivots are set, the last one of
// them is the last order to count; target_of(sum of all) is asked after the first turn. False if
// all together do not reach the target.
template <bool kByMass, typename Target>
__device__ bool narrow_to_list(Shared &shared, const Row &row, Target target_of) {
  Search &search = shared.search;
#pragma unroll 1
  for (uint32_t turn = 0;; turn++) {
    __syncthreads(); // pivots are set
    measure<kByMass>(shared, row);
    if (threadIdx.x == 0) {
      if (turn == 0) {
        search.target = target_of(shared.mass[1]);
      }
      narrow(shared);
    }
    __syncthreads();
    if (turn == 0 && shared.mass[1] < search.target) {
      return false;
    }
    // A short count wants all its tokens in the list.
    const bool is_short = !kByMass && search.target <= kList;
    if (search.end_count - (is_short ? 0 : search.before_count) <= kList) {
      return true;
    }
    if (threadIdx.x == 0) {
      divide_range(row, search, turn);
    }
  }
}

// The cut of the tokens up to `limit` whose running count (or mass) reaches what target_of(sum of
// all) says. `guess`: an order to try first.
template <bool kByMass, typename Target>
__device__ Cut find(Shared &shared, const Row &row, const Scale &scale, uint64_t guess,
                    float least, uint64_t limit, Target target_of) {
  Search &search = shared.search;
  __syncthreads(); // everyone is done with the last search
  if (threadIdx.x == 0) {
    // Tokens at minus infinity have no mass.
    const uint64_t end = kByMass ? min(last_order(row, least), limit) : limit;
    search = {scale, least, {min(guess, end), end}, order_of(row, scale.max, 0), end, 0, 0, 0, 0};
  }
  if (!narrow_to_list<kByMass>(shared, row, target_of)) {
    return {limit, 0}; // all of them
  }
  const bool whole = search.end_count <= kList;
  const uint64_t start = whole ? order_of(row, scale.max, 0) : search.start;
  const uint32_t count = gather(shared, row, start, search.end);
  sort_list(shared, count);
  find_crossing<4>(
      shared, count,
      [&](uint32_t at) {
        return kByMass ? to_units(weight(scale, logit_of(row, shared.list[at]))) : 1;
      },
      [&](uint64_t) { return search.target - (whole ? 0 : search.before); });
  const uint32_t found = min(shared.found, count - 1);
  return {shared.list[found], whole ? found + 1 : 0};
}

// Orders at which a search begins: ranks among the stripes' maxima, the least likely number.
struct Guesses {
  uint64_t low;
  uint64_t top_k;
  float least; // the smallest logit above minus infinity
};

// Sorts the stripes' maxima and reads guesses from them.
__device__ Guesses guess(Shared &shared, const Row &row, uint32_t top_k, float least) {
  sort_list(shared, kThreads);
  const Guesses guesses = {shared.list[kRankLow - 1],
                           shared.list[min(max(top_k, 1u), kRankLow) - 1],
                           least};
  __syncthreads();
  return guesses;
}

// The `count` most likely tokens, count > 0.
__device__ Cut keep_most_likely(Shared &shared, const Row &row, const Scale &scale,
                                const Guesses &guesses, uint32_t count) {
  const uint64_t limit = last_order(row, -INFINITY);
  if (count <= kRankTopK && guesses.top_k <= limit) {
    // As many stripes, so as many tokens, reach this maximum.
    const uint32_t listed = gather(shared, row, order_of(row, scale.max, 0), guesses.top_k);
    if (listed <= kList) {
      sort_list(shared, listed);
      return {shared.list[count - 1], count};
    }
  }
  return find<false>(shared, row, scale, guesses.top_k, guesses.least, limit,
                     [&](uint64_t) { return (uint64_t)count; });
}

// The cut of top-k and top-p.
__device__ Cut find_cut(Shared &shared, const Row &row, const Scale &scale, const fb_slot &slot,
                        const Guesses &guesses) {
  Cut cut = {last_order(row, -INFINITY), 0};
  if (slot.top_k > 0 && slot.top_k < row.vocab) {
    cut = keep_most_likely(shared, row, scale, guesses, slot.top_k);
  }
  if (!(slot.top_p < 1)) {
    return cut;
  }
  const auto target_of = [&](uint64_t total) { return part_of(total, slot.top_p); };
  if (cut.listed == 0) {
    return find<true>(shared, row, scale, guesses.low, guesses.least, cut.last, target_of);
  }
  find_crossing<4>(
      shared, cut.listed,
      [&](uint32_t at) { return to_units(weight(scale, logit_of(row, shared.list[at]))); },
      target_of);
  const uint32_t found = min(shared.found, cut.listed - 1);
  return {shared.list[found], found + 1};
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
      shared, count, [&](uint32_t at) { return draw.units(__uint_as_float((uint32_t)shared.list[at])); },
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
  for_each_four<4>(row, [&](uint32_t first, const float(&logits)[4]) {
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
  const Guesses guesses = guess(shared, row, top, least);
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
    cut = find_cut(shared, row, scale, slot, guess(shared, row, slot.top_k, least));
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

extern "C" __global__ void __launch_bounds__(256) forebay_count(const __grid_constant__ fb_count p) {
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
