// A stand-in for the CUDA driver, for machines without a GPU: the functions that the CUDA backend
// calls, over the host's memory, with every kernel of abi.h written down again in the plainest way.
// It proves the host's side (what is packed, uploaded, launched and read back, and when), not the
// kernels: those are tested by themselves. Compiled with FOREBAY_HOST_KERNELS and linked with the
// host run of tests/kernels it runs the kernels themselves, slowly.
//
// Nothing that is queued runs before somebody waits for it, so that a missing wait, or a buffer
// written too early, shows. Every pointer that a kernel is given must lie inside one allocation.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "../../kernels/abi.h"
#ifdef FOREBAY_HOST_KERNELS
#include "../kernels/host/run.h"
#endif

namespace {

using Work = std::function<void()>;

std::recursive_mutex lock;
std::map<uintptr_t, size_t> allocations;
std::vector<Work> queued;
std::vector<Work> *recording = nullptr;

// Handles are never null: the bindings look at none, but a null one is a likely mistake.
std::map<std::string, std::string *> functions;

constexpr int OK = 0, INVALID = 1, OUT_OF_MEMORY = 2, NOT_READY = 600;
constexpr size_t MEMORY_BYTES = size_t(8) << 30;

[[noreturn]] void fail(const char *what) {
  std::fprintf(stderr, "stand-in driver: %s\n", what);
  std::abort();
}

void run_all() {
  std::vector<Work> work;
  work.swap(queued);
  for (Work &one : work) one();
}

void queue(Work one) { (recording ? *recording : queued).push_back(std::move(one)); }

// `count` values at a device address, which must be ours.
template <typename T> T *at(const T *pointer, size_t count) {
  uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  auto after = allocations.upper_bound(address);
  if (count == 0) return const_cast<T *>(pointer);
  if (after == allocations.begin()) fail("an address outside device memory");
  auto [start, bytes] = *std::prev(after);
  if (address + count * sizeof(T) > start + bytes) fail("an array beyond its allocation");
  if (address % 16 != 0 && count > 1) fail("an array that is not 16-byte aligned");
  return const_cast<T *>(pointer);
}

float from_bf16(fb_bf16 bits) {
  uint32_t word = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

fb_bf16 to_bf16(float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  return fb_bf16((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

float from_f16(fb_f16 bits) {
  int exponent = bits >> 10 & 31, fraction = bits & 1023;
  float value = exponent == 0 ? std::ldexp(float(fraction), -24)
                              : std::ldexp(float(1024 + fraction), exponent - 25);
  return bits & 0x8000 ? -value : value;
}

// Row `row` of the tiles of a weight, whatever row of the matrix that is.
void tile_row(const fb_weight &weight, uint32_t row, std::vector<float> &out) {
  uint32_t blocks = weight.columns / FB_TILE_COLS, band = row / FB_TILE_ROWS;
  uint32_t bands = (weight.rows + FB_TILE_ROWS - 1) / FB_TILE_ROWS;
  uint32_t r = row % FB_TILE_ROWS;
  size_t lane_bytes = weight.type == FB_BF16 ? 32 : weight.type == FB_Q8 ? 16 : 8;
  const uint8_t *tiles = at(static_cast<const uint8_t *>(weight.tiles),
                            size_t(bands) * blocks * 32 * lane_bytes);
  size_t per_tile = weight.type == FB_BF16 ? 0 : weight.type == FB_Q4M ? 32 : 16;
  const fb_f16 *scales = at(weight.scales, size_t(bands) * blocks * per_tile);
  out.resize(weight.columns);
  for (uint32_t block = 0; block < blocks; block++) {
    size_t tile = size_t(band) * blocks + block;
    for (uint32_t column = 0; column < FB_TILE_COLS; column++) {
      uint32_t step = column / 16, c = column % 16;
      uint32_t lane = 4 * (r % 8) + c % 8 / 2;
      uint32_t value = c % 2 + 2 * (r / 8) + 4 * (c / 8);
      const uint8_t *bytes = tiles + tile * 32 * lane_bytes;
      float &to = out[block * FB_TILE_COLS + column];
      if (weight.type == FB_BF16) {
        fb_bf16 bits;
        std::memcpy(&bits, bytes + 2 * ((step * 32 + lane) * 8 + value), 2);
        to = from_bf16(bits);
      } else if (weight.type == FB_Q8) {
        to = from_f16(scales[tile * 16 + r % 8 * 2 + r / 8]) * int8_t(bytes[lane * 16 + step * 8 + value]);
      } else {
        uint32_t word;
        std::memcpy(&word, bytes + lane * 8 + step * 4, 4);
        float q = float(word >> (4 * (value / 2) + 16 * (value % 2)) & 15);
        to = weight.type == FB_Q4 ? from_f16(scales[tile * 16 + r % 8 * 2 + r / 8]) * (q - 8)
                                  : from_f16(scales[tile * 32 + r % 8 * 4 + r / 8]) * q +
                                        from_f16(scales[tile * 32 + r % 8 * 4 + 2 + r / 8]);
      }
    }
  }
}

struct Grid {
  uint32_t x, y, z, threads, shared;
};

void embed(const fb_embed &p, Grid grid) {
  std::vector<float> row;
  uint32_t tokens = std::min(at(p.step, 1)->tokens, grid.x);
  for (uint32_t i = 0; i < tokens; i++) {
    uint32_t token = at(p.token_ids, tokens)[i];
    if (token == FB_NONE) token = p.last_tokens[at(p.token_slots, tokens)[i]];
    if (token >= p.table.rows) fail("a token outside the vocabulary");
    tile_row(p.table, token, row);
    std::memcpy(at(p.x, size_t(tokens) * p.table.columns) + size_t(i) * p.table.columns, row.data(),
                row.size() * 4);
  }
}

void rmsnorm(const fb_rmsnorm &p, Grid grid) {
  uint32_t rows = std::min(*at(p.count, 1), grid.x), k = p.columns;
  for (uint32_t row = 0; row < rows; row++) {
    uint32_t from = p.gather ? at(p.gather, rows)[row] : row;
    if (from == FB_NONE) continue;
    const float *x = at(p.x, size_t(from + 1) * k) + size_t(from) * k;
    double sum = 0;
    for (uint32_t i = 0; i < k; i++) sum += double(x[i]) * x[i];
    float scale = float(1 / std::sqrt(sum / k + p.eps));
    fb_bf16 *y = at(p.y, size_t(rows) * k) + size_t(row) * k;
    for (uint32_t i = 0; i < k; i++) y[i] = to_bf16(x[i] * scale * at(p.weight, k)[i]);
  }
}

// All tile rows times all tokens: out[token][tile row].
std::vector<float> product(const fb_gemm &p, uint32_t tokens) {
  uint32_t k = p.weight.columns;
  uint32_t n = (p.weight.rows + FB_TILE_ROWS - 1) / FB_TILE_ROWS * FB_TILE_ROWS;
  std::vector<float> x(size_t(tokens) * k), out(size_t(tokens) * n), row;
  const fb_bf16 *from = at(p.x, x.size());
  for (size_t i = 0; i < x.size(); i++) x[i] = from_bf16(from[i]);
  for (uint32_t r = 0; r < n; r++) {
    tile_row(p.weight, r, row);
    for (uint32_t t = 0; t < tokens; t++) {
      float sums[8] = {};
      const float *values = &x[size_t(t) * k];
      for (uint32_t i = 0; i < k; i += 8)
        for (int j = 0; j < 8; j++) sums[j] += row[i + j] * values[i + j];
      float sum = 0;
      for (float part : sums) sum += part;
      out[size_t(t) * n + r] = sum;
    }
  }
  return out;
}

void put_qkv(const fb_gemm &p, uint32_t t, uint32_t pair, float a, float b) {
  uint32_t half = p.head_dim / 2, head = pair / half, i = pair % half;
  uint32_t position = p.positions[t];
  if (head < p.heads + p.kv_heads && i < p.rope_dims / 2) {
    const float *turn = at(p.rope, size_t(position + 1) * p.rope_dims) +
                        (size_t(position) * (p.rope_dims / 2) + i) * 2;
    float x = a * turn[0] - b * turn[1], y = a * turn[1] + b * turn[0];
    a = x, b = y;
  }
  if (head < p.heads) {
    fb_bf16 *q = at(p.y16, size_t(t + 1) * p.heads * p.head_dim) +
                 (size_t(t) * p.heads + head) * p.head_dim + 2 * i;
    q[0] = to_bf16(a), q[1] = to_bf16(b);
    return;
  }
  uint32_t place = p.kv_places[t], kv_head = (head - p.heads) % p.kv_heads;
  bool is_value = head >= p.heads + p.kv_heads;
  if (place == FB_NONE) return;
  size_t block_values = size_t(p.kv_heads) * 2 * FB_BLOCK_POSITIONS * p.head_dim;
  size_t part = (size_t(kv_head) * 2 + is_value) * FB_BLOCK_POSITIONS + place % FB_BLOCK_POSITIONS;
  fb_bf16 *kv = at(p.kv, (place / FB_BLOCK_POSITIONS + 1) * block_values);
  kv += place / FB_BLOCK_POSITIONS * block_values + part * p.head_dim + 2 * i;
  kv[0] = to_bf16(a), kv[1] = to_bf16(b);
}

void gemm(const fb_gemm &p, Grid grid, const std::string &epilogue, uint32_t width) {
  uint32_t tokens = *at(p.count, 1), n = p.weight.rows;
  if (tokens > grid.y * width) fail("a product's grid does not cover its tokens");
  uint32_t bands = (n + FB_TILE_ROWS - 1) / FB_TILE_ROWS;
  if (p.ksplit != fb_ksplit(n, p.weight.columns)) fail("another split of K");
  if (p.in_turn && width < FB_GEMM_IN_TURN) fail("a product that cannot take its parts in turn");
  const uint32_t sharing = p.in_turn ? 1 : p.ksplit;
  if (grid.x != fb_gemm_grid_x(n, sharing)) fail("a product's grid does not cover its rows");
  if (grid.shared != fb_gemm_shared_bytes(p.weight.type, width, sharing)) fail("a product's shared memory");
  std::vector<float> c = product(p, tokens);
  size_t stride = size_t(bands) * FB_TILE_ROWS;
  for (uint32_t t = 0; t < tokens; t++) {
    for (uint32_t r = 0; r < stride; r++) {
      float value = c[t * stride + r];
      if (epilogue == "store" && r < n) at(p.y32, size_t(tokens) * n)[size_t(t) * n + r] = value;
      if (epilogue == "residual" && r < n)
        at(p.y32, size_t(tokens) * n)[size_t(t) * n + r] += value;
      uint32_t pair = r / 16 * 8 + r % 8;
      if (r % 16 >= 8 || pair >= n / 2) continue;
      float second = c[t * stride + r + 8];
      if (epilogue == "swiglu")
        at(p.y16, size_t(tokens) * (n / 2))[size_t(t) * (n / 2) + pair] =
            to_bf16(value / (1 + std::exp(-value)) * second);
      if (epilogue == "qkv") put_qkv(p, t, pair, value, second);
    }
  }
}

// How often each token was attended since the last merge.
std::map<uint32_t, uint32_t> attended;

void attend(const fb_attention &p, uint32_t dim, const fb_query_tile &tile, uint32_t kv_head,
            uint32_t split) {
  const fb_row &row = at(p.rows, p.step->rows)[tile.row];
  uint32_t group = p.heads / p.kv_heads, tile_tokens = std::max(1u, 16 / group);
  size_t block_values = size_t(p.kv_heads) * 2 * FB_BLOCK_POSITIONS * dim;
  uint32_t span = FB_SPLIT_BLOCKS * FB_BLOCK_POSITIONS;
  for (uint32_t i = tile.token_start; i < std::min(tile.token_start + tile_tokens, row.token_count); i++) {
    uint32_t t = row.token_start + i, own = p.positions[t];
    if (own != row.position + i) fail("a token's position is not its row's");
    uint32_t end = std::min(own + 1, (split + 1) * span);
    for (uint32_t h = kv_head * group; h < (kv_head + 1) * group && split * span < end; h++) {
      const fb_bf16 *q = at(p.q, size_t(t + 1) * p.heads * dim) + (size_t(t) * p.heads + h) * dim;
      std::vector<float> scores, o(dim);
      float m = -INFINITY, l = 0;
      auto value_at = [&](uint32_t position, bool is_value) {
        uint32_t block = at(p.blocks + row.block_start, 1)[position / FB_BLOCK_POSITIONS];
        const fb_bf16 *values = at(p.kv, (block + 1) * block_values) + block * block_values;
        size_t part = (size_t(kv_head) * 2 + is_value) * FB_BLOCK_POSITIONS;
        return values + (part + position % FB_BLOCK_POSITIONS) * dim;
      };
      for (uint32_t position = split * span; position < end; position++) {
        const fb_bf16 *key = value_at(position, false);
        float dot = 0;
        for (uint32_t d = 0; d < dim; d++) dot += from_bf16(q[d]) * from_bf16(key[d]);
        scores.push_back(dot * p.scale_log2);
        m = std::max(m, scores.back());
      }
      for (uint32_t position = split * span; position < end; position++) {
        float weight = std::exp2(scores[position - split * span] - m);
        l += weight;
        const fb_bf16 *value = value_at(position, true);
        for (uint32_t d = 0; d < dim; d++) o[d] += weight * from_bf16(value[d]);
      }
      size_t partial = (size_t(t) * p.heads + h) * p.splits_max + split;
      for (uint32_t d = 0; d < dim; d++) at(p.partial_o, (partial + 1) * dim)[partial * dim + d] = o[d] / l;
      at(p.partial_ml, (partial + 1) * 2)[partial * 2] = m;
      p.partial_ml[partial * 2 + 1] = l;
    }
  }
}

void attention(const fb_attention &p, Grid grid, uint32_t dim, bool prefill) {
  if (grid.shared != FB_ATTENTION_SHARED_BYTES(dim)) fail("attention's shared memory");
  uint32_t group = p.heads / p.kv_heads, tile_tokens = std::max(1u, 16 / group);
  uint32_t tiles = grid.x * (prefill ? 4 : 1);
  for (uint32_t i = 0; i < tiles; i++) {
    const fb_query_tile &tile = at(p.tiles, tiles)[i];
    if (tile.row == FB_NONE) continue;
    if (prefill && tile.row != p.tiles[i / 4 * 4].row) fail("four tiles of different rows");
    const fb_row &row = at(p.rows, p.step->rows)[tile.row];
    for (uint32_t j = tile.token_start; j < std::min(tile.token_start + tile_tokens, row.token_count); j++)
      attended[row.token_start + j]++;
    for (uint32_t h = 0; h < p.kv_heads; h++)
      for (uint32_t split = 0; split < p.splits_max; split++) attend(p, dim, tile, h, split);
  }
}

void merge(const fb_attention &p, uint32_t dim) {
  uint32_t tokens = at(p.step, 1)->tokens;
  for (uint32_t t = 0; t < tokens; t++)
    if (attended[t] != 1) fail("query tiles do not cover every token once");
  attended.clear();
  for (size_t i = 0; i < size_t(tokens) * p.heads; i++) {
    uint32_t splits = p.positions[i / p.heads] / (FB_SPLIT_BLOCKS * FB_BLOCK_POSITIONS) + 1;
    float m = -INFINITY, l = 0;
    const float *ml = at(p.partial_ml, (i + 1) * p.splits_max * 2) + i * p.splits_max * 2;
    for (uint32_t s = 0; s < splits; s++) m = std::max(m, ml[2 * s]);
    std::vector<float> o(dim);
    for (uint32_t s = 0; s < splits; s++) {
      float weight = std::exp2(ml[2 * s] - m) * ml[2 * s + 1];
      l += weight;
      for (uint32_t d = 0; d < dim; d++) o[d] += weight * p.partial_o[(i * p.splits_max + s) * dim + d];
    }
    for (uint32_t d = 0; d < dim; d++)
      at(p.y, size_t(tokens) * p.heads * dim)[i * dim + d] = to_bf16(o[d] / l);
  }
}

// Greedy after penalties and bias: what needs the draw is the kernel's own test's business.
void sample(const fb_sample &p, Grid grid) {
  uint32_t sampled = at(p.step, 1)->sampled;
  if (grid.x < sampled) fail("rows that are not sampled");
  for (uint32_t i = 0; i < sampled; i++) {
    const fb_row &row = at(p.rows, p.step->rows)[at(p.sampled_rows, sampled)[i]];
    if (row.sampled != i) fail("a row does not know its sample");
    const fb_slot &slot = at(p.slots, row.slot + 1)[row.slot];
    float *logits = at(p.logits, size_t(sampled) * p.vocab) + size_t(i) * p.vocab;
    uint32_t *counts = at(p.counts, size_t(row.slot + 1) * p.vocab) + size_t(row.slot) * p.vocab;
    bool penal = slot.repetition_penalty != 1 || slot.frequency_penalty != 0 || slot.presence_penalty != 0;
    for (uint32_t token = 0; token < p.vocab && penal; token++) {
      uint32_t outputs = counts[token] & 0x7fffffff;
      if (counts[token] == 0) continue;
      float &logit = logits[token];
      logit = logit > 0 ? logit / slot.repetition_penalty : logit * slot.repetition_penalty;
      logit -= slot.frequency_penalty * outputs + (outputs ? slot.presence_penalty : 0);
    }
    const fb_bias *biases = at(p.biases, slot.bias_start + slot.bias_count) + slot.bias_start;
    for (uint32_t j = 0; j < slot.bias_count; j++) logits[biases[j].token] += biases[j].bias;
    uint32_t best = 0;
    for (uint32_t token = 1; token < p.vocab; token++)
      if (logits[token] > logits[best]) best = token;
    counts[best]++;
    at(p.last_tokens, row.slot + 1)[row.slot] = best;
    fb_sampled &result = at(p.results, sampled)[i];
    result = fb_sampled{};
    result.token = best;
  }
}

void count(const fb_count &p, Grid grid) {
  if (grid.x != p.setups_count) fail("setups that are not counted");
  for (uint32_t i = 0; i < p.setups_count; i++) {
    const fb_slot_setup &setup = at(p.setups, p.setups_count)[i];
    uint32_t *counts = at(p.counts, size_t(setup.slot + 1) * p.vocab) + size_t(setup.slot) * p.vocab;
    std::memset(counts, 0, size_t(p.vocab) * 4);
    const uint32_t *history = at(p.history, setup.history_start + setup.history_count);
    for (uint32_t j = 0; j < setup.history_count; j++) {
      uint32_t &of = counts[history[setup.history_start + j]];
      if (j < setup.history_prompt_count) of |= 0x80000000u; else of++;
    }
  }
}

template <typename P>
Work bound(const std::string &name, Grid grid, void **arguments,
           std::function<void(const P &)> plainly) {
  P p = *static_cast<const P *>(arguments[0]);
#ifdef FOREBAY_HOST_KERNELS
  // FOREBAY_TEST_PLAIN=NAME: kernels with that in their name run plainly, to find one that is wrong.
  const char *plain = std::getenv("FOREBAY_TEST_PLAIN");
  if (plain && name.find(plain) != std::string::npos) return [=] { plainly(p); };
  return [=] {
    const uint32_t blocks[3] = {grid.x, grid.y, grid.z}, block[3] = {grid.threads, 1, 1};
    fb_host_launch(name.c_str(), blocks, block, grid.shared, &p, sizeof(P));
  };
#else
  (void)name, (void)grid;
  return [=] { plainly(p); };
#endif
}

// The work of a launch; empty for a name that is no kernel's.
Work launch(const std::string &name, Grid grid, void **arguments) {
  auto begins = [&](const char *prefix) { return name.rfind(prefix, 0) == 0; };
  uint32_t last = uint32_t(std::atoi(name.c_str() + name.rfind('_') + 1));
  if (name == "forebay_embed")
    return bound<fb_embed>(name, grid, arguments, [grid](const fb_embed &p) { embed(p, grid); });
  if (name == "forebay_rmsnorm")
    return bound<fb_rmsnorm>(name, grid, arguments, [grid](const fb_rmsnorm &p) { rmsnorm(p, grid); });
  if (begins("forebay_gemm_")) {
    size_t end = name.rfind('_'), start = name.rfind('_', end - 1) + 1;
    std::string epilogue = name.substr(start, end - start);
    return bound<fb_gemm>(name, grid, arguments, [=](const fb_gemm &p) { gemm(p, grid, epilogue, last); });
  }
  if (begins("forebay_attention_merge_"))
    return bound<fb_attention>(name, grid, arguments, [last](const fb_attention &p) { merge(p, last); });
  if (begins("forebay_attention_")) {
    bool prefill = begins("forebay_attention_prefill_");
    return bound<fb_attention>(name, grid, arguments,
                               [=](const fb_attention &p) { attention(p, grid, last, prefill); });
  }
  if (name == "forebay_sample")
    return bound<fb_sample>(name, grid, arguments, [grid](const fb_sample &p) { sample(p, grid); });
  if (name == "forebay_count")
    return bound<fb_count>(name, grid, arguments, [grid](const fb_count &p) { count(p, grid); });
  return {};
}

using Graph = std::vector<Work>;
using Guard = std::lock_guard<std::recursive_mutex>;

void *handle() {
  static char something;
  return &something;
}

} // namespace

extern "C" {

int cuInit(unsigned) { return OK; }
int cuDeviceGetCount(int *count) { return *count = 1, OK; }
int cuDeviceGet(int *device, int) { return *device = 0, OK; }
int cuDeviceGetName(char *name, int length, int) {
  return std::snprintf(name, size_t(length), "stand-in for a GPU"), OK;
}
int cuDeviceTotalMem_v2(size_t *bytes, int) { return *bytes = MEMORY_BYTES, OK; }
// 75 and 76 are the compute capability.
int cuDeviceGetAttribute(int *value, int attribute, int) {
  return *value = attribute == 75 ? 9 : 0, OK;
}
int cuDevicePrimaryCtxRetain(void **context, int) { return *context = handle(), OK; }
int cuDevicePrimaryCtxRelease_v2(int) { return OK; }
int cuCtxSetCurrent(void *) { return OK; }
int cuModuleLoadDataEx(void **module, const void *image, unsigned, void *, void *) {
  return *module = handle(), image ? OK : INVALID;
}
int cuModuleUnload(void *) { return OK; }
int cuModuleGetFunction(void **function, void *, const char *name) {
  Guard guard(lock);
  std::string *&known = functions[name];
  if (!known) known = new std::string(name);
  return *function = known, OK;
}
int cuFuncGetAttribute(int *value, int, void *) { return *value = 32, OK; }
int cuFuncSetAttribute(void *, int, int) { return OK; }
int cuStreamCreateWithPriority(void **stream, unsigned, int) { return *stream = handle(), OK; }
int cuStreamDestroy_v2(void *) { return OK; }
int cuEventCreate(void **event, unsigned) { return *event = handle(), OK; }
int cuEventDestroy_v2(void *) { return OK; }
int cuEventRecord(void *, void *) { return OK; }
// Now and then not ready yet, so that whoever asks asks again.
int cuEventQuery(void *) {
  static int asked;
  Guard guard(lock);
  if (++asked % 3) return NOT_READY;
  return run_all(), OK;
}
int cuEventSynchronize(void *) {
  Guard guard(lock);
  return run_all(), OK;
}
int cuMemGetInfo_v2(size_t *free, size_t *total) {
  Guard guard(lock);
  size_t taken = 0;
  for (auto [start, bytes] : allocations) taken += bytes;
  return *total = MEMORY_BYTES, *free = MEMORY_BYTES - taken, OK;
}
int cuMemAlloc_v2(unsigned long long *address, size_t bytes) {
  Guard guard(lock);
  void *memory = bytes < MEMORY_BYTES ? std::aligned_alloc(256, (bytes + 255) / 256 * 256) : nullptr;
  if (!memory) return OUT_OF_MEMORY;
  std::memset(memory, 0xff, bytes);
  *address = reinterpret_cast<uintptr_t>(memory);
  return allocations[uintptr_t(*address)] = bytes, OK;
}
int cuMemFree_v2(unsigned long long address) {
  Guard guard(lock);
  run_all();
  if (!allocations.erase(uintptr_t(address))) return INVALID;
  return std::free(reinterpret_cast<void *>(address)), OK;
}
int cuMemsetD8_v2(unsigned long long address, unsigned char value, size_t bytes) {
  return std::memset(reinterpret_cast<void *>(address), value, bytes), OK;
}
int cuMemAllocHost_v2(void **memory, size_t bytes) {
  return *memory = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096), OK;
}
int cuMemFreeHost(void *memory) { return std::free(memory), OK; }
int cuMemcpyHtoD_v2(unsigned long long to, const void *from, size_t bytes) {
  Guard guard(lock);
  run_all();
  return std::memcpy(at(reinterpret_cast<char *>(to), bytes), from, bytes), OK;
}
int cuMemcpyDtoH_v2(void *to, unsigned long long from, size_t bytes) {
  Guard guard(lock);
  run_all();
  return std::memcpy(to, at(reinterpret_cast<char *>(from), bytes), bytes), OK;
}
int cuMemcpyHtoDAsync_v2(unsigned long long to, const void *from, size_t bytes, void *) {
  Guard guard(lock);
  queue([=] { std::memcpy(at(reinterpret_cast<char *>(to), bytes), from, bytes); });
  return OK;
}
int cuMemcpyDtoHAsync_v2(void *to, unsigned long long from, size_t bytes, void *) {
  Guard guard(lock);
  queue([=] { std::memcpy(to, at(reinterpret_cast<char *>(from), bytes), bytes); });
  return OK;
}
int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned,
                   unsigned shared, void *, void **arguments, void **) {
  Guard guard(lock);
  if (x == 0 || y == 0 || z == 0 || y > 65535 || z > 65535 || threads > 1024) return INVALID;
  Work work = launch(*static_cast<std::string *>(function), {x, y, z, threads, shared}, arguments);
  if (!work) return INVALID;
  return queue(std::move(work)), OK;
}
int cuStreamBeginCapture_v2(void *, int) {
  Guard guard(lock);
  if (recording) return INVALID;
  return recording = new Graph, OK;
}
int cuStreamEndCapture(void *, void **graph) {
  Guard guard(lock);
  *graph = recording;
  return recording = nullptr, OK;
}
int cuGraphInstantiateWithFlags(void **runnable, void *graph, unsigned long long) {
  return *runnable = new Graph(*static_cast<Graph *>(graph)), OK;
}
int cuGraphDestroy(void *graph) { return delete static_cast<Graph *>(graph), OK; }
int cuGraphExecDestroy(void *graph) { return delete static_cast<Graph *>(graph), OK; }
int cuGraphLaunch(void *graph, void *) {
  Guard guard(lock);
  Graph work = *static_cast<Graph *>(graph);
  queue([work] {
    for (const Work &one : work) one();
  });
  return OK;
}
}
