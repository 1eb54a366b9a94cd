// Finding the cuts of filters in the order of likelihood: see sampling.cu.
#pragma once
#include "sampling_row.cuh"

namespace {

// Log-probabilities in the raw distribution: what to subtract from a logit, and the alternatives.
struct Raw {
  float max;
  float log_sum;
  __device__ float logprob(float logit) const { return (logit - max) - log_sum; }
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

// The most likely token's order (kNone without a number above minus infinity), to all threads; the
// smallest number above minus infinity in `least`; the stripes' maxima in the list, unsorted.
__device__ uint64_t find_most_likely(Shared &shared, const Row &row, float &least) {
  float best = -INFINITY, low = INFINITY;
  uint32_t token = FB_NONE;
  for_each_four(row, [&](uint32_t first, const float(&logits)[4]) {
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
  for_each_four(row, [&](uint32_t first, const float(&logits)[4]) {
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
  for_each_four(row, [&](uint32_t first, const float(&logits)[4]) {
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
__device__ Guesses guess(Shared &shared, uint32_t top_k, float least) {
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

} // namespace
