// Attention over a paged cache against f64, and bit for bit against itself: prefill and decode,
// alone and in company, with whatever number of splits a launch takes at once.
#include <algorithm>

#include "attention.h"
#include "reference.h"

namespace {

struct Heads {
  uint32_t heads, kv_heads, dim;
};

// Consecutive tokens of a sequence whose earlier positions are in the cache.
struct Part {
  uint32_t sequence, position, count;
};

// Sequences with all their queries, keys and values.
class Scene {
public:
  Scene(Heads heads, uint32_t sequences, uint32_t length)
      : heads_(heads), length_(length), random_(heads.heads * 100 + heads.dim) {
    name_ = "attention " + std::to_string(heads.dim) + ", " + std::to_string(heads.heads) + "/" +
            std::to_string(heads.kv_heads) + " heads";
    for (uint32_t i = 0; i < sequences; i++) {
      q_.push_back(random_bf16(random_, (size_t)length * heads.heads * heads.dim, 1.5));
      k_.push_back(random_bf16(random_, (size_t)length * heads.kv_heads * heads.dim));
      v_.push_back(random_bf16(random_, (size_t)length * heads.kv_heads * heads.dim));
    }
  }

  // Runs parts as one step, by both kernels, and checks them.
  void check_step(const std::vector<Part> &parts, const std::string &what, uint32_t grid_z = 0) {
    check_step_by(false, parts, name_ + ": " + what, grid_z);
    check_step_by(true, parts, name_ + ": " + what + ", by the prefill kernel", grid_z);
  }

private:
  struct Step {
    explicit Step(const std::vector<Part> &parts) : parts(parts) {}
    std::vector<Part> parts;
    std::vector<fb_row> rows;
    std::vector<uint32_t> blocks, positions;
    std::vector<fb_query_tile> tiles;
    std::vector<fb_bf16> q, kv;
    uint32_t splits = 1;
    bool is_prefill = false;
  };

  // Against f64, and against earlier runs' bits.
  void check_step_by(bool is_prefill, const std::vector<Part> &parts, const std::string &full,
                     uint32_t grid_z) {
    if (!has_kernel()) {
      check(false, "there is a kernel for " + name_);
      return;
    }
    Step step(parts);
    step.is_prefill = is_prefill;
    lay_out(step);
    const std::vector<fb_bf16> y = run(step, grid_z, full);
    const size_t width = (size_t)heads_.heads * heads_.dim;
    size_t at = 0;
    std::vector<double> want;
    for (const Part &part : parts) {
      for (uint32_t i = 0; i < part.count; i++, at += width) {
        const std::vector<double> its = refer(part.sequence, part.position + i);
        want.insert(want.end(), its.begin(), its.end());
        std::vector<fb_bf16> &known = known_[{part.sequence, part.position + i}];
        if (known.empty()) {
          known.assign(&y[at], &y[at] + width);
        }
        check(memcmp(known.data(), &y[at], width * 2) == 0,
              full + ": position " + std::to_string(part.position + i) + " depends on the batch");
      }
    }
    check_close(widened({y.begin(), y.begin() + at}), want, 5e-3, full);
    check(is_untouched(&y[at], y.size() - at), full + ": wrote a padded token");
  }

  bool has_kernel() {
    const std::string kernel = "forebay_attention_" + std::to_string(heads_.dim);
    return device->has(kernel.c_str());
  }

  // A cache of shuffled blocks that holds each part's positions and no other number.
  void lay_out(Step &step) {
    uint32_t block_count = 3, token = 0;
    for (const Part &part : step.parts) {
      block_count += (part.position + part.count + 63) / 64;
    }
    std::vector<uint32_t> free(block_count);
    for (uint32_t i = 0; i < block_count; i++) {
      free[i] = i;
      std::swap(free[i], free[random_.below(i + 1)]);
    }
    const uint32_t dim = heads_.dim, kv_heads = heads_.kv_heads;
    step.kv.assign((size_t)block_count * kv_heads * 2 * 64 * dim, 0xffff);
    for (const Part &part : step.parts) {
      const uint32_t start = (uint32_t)step.blocks.size(), end = part.position + part.count;
      step.rows.push_back({token, part.count, part.position, start, 0, FB_NONE});
      for (uint32_t position = 0; position < end; position++) {
        if (position % 64 == 0) {
          step.blocks.push_back(free.back());
          free.pop_back();
        }
        for (uint32_t head = 0; head < kv_heads; head++) {
          const size_t from = ((size_t)position * kv_heads + head) * dim;
          const size_t plane = ((size_t)step.blocks.back() * kv_heads + head) * 2;
          std::copy_n(&k_[part.sequence][from], dim, &step.kv[(plane * 64 + position % 64) * dim]);
          std::copy_n(&v_[part.sequence][from], dim,
                      &step.kv[((plane + 1) * 64 + position % 64) * dim]);
        }
      }
      const size_t width = (size_t)heads_.heads * dim;
      const auto q = q_[part.sequence].begin() + part.position * width;
      step.q.insert(step.q.end(), q, q + part.count * width);
      for (uint32_t i = 0; i < part.count; i++) {
        step.positions.push_back(part.position + i);
      }
      const uint32_t each = tile_tokens(heads_.heads, heads_.kv_heads);
      for (uint32_t first = 0; first < part.count; first += each) {
        step.tiles.push_back({(uint32_t)step.rows.size() - 1, first});
      }
      while (step.is_prefill && step.tiles.size() % 4 != 0) {
        step.tiles.push_back({FB_NONE, 0});
      }
      step.splits = std::max(step.splits, (end + 255) / 256);
      token += part.count;
    }
    step.tiles.insert(step.tiles.end(), 4, {FB_NONE, 0});
  }

  std::vector<fb_bf16> run(const Step &step, uint32_t grid_z, const std::string &what) {
    const uint32_t tokens = (uint32_t)step.positions.size(), padded = tokens + 1;
    const size_t width = (size_t)heads_.heads * heads_.dim;
    const uint32_t splits = step.splits + 1; // a stride beyond what is needed
    Array<fb_bf16> q(step.q), kv(step.kv), y(padded * width);
    Array<fb_row> rows(step.rows);
    Array<uint32_t> blocks(step.blocks), positions(step.positions);
    Array<fb_query_tile> tiles(step.tiles);
    Array<fb_step> state(std::vector<fb_step>{{tokens, (uint32_t)step.rows.size(), 0, 0}});
    Array<float> partial_o(padded * width * splits);
    Array<float> partial_ml((size_t)padded * heads_.heads * splits * 2);
    fb_attention p = {};
    p.q = q.at();
    p.kv = kv.at();
    p.rows = rows.at();
    p.blocks = blocks.at();
    p.tiles = tiles.at();
    p.positions = positions.at();
    p.step = state.at();
    p.partial_o = partial_o.at();
    p.partial_ml = partial_ml.at();
    p.y = y.at();
    p.heads = heads_.heads;
    p.kv_heads = heads_.kv_heads;
    p.splits_max = splits;
    p.scale_log2 = (float)(1.4426950408889634 / sqrt(heads_.dim));
    const uint32_t z = grid_z == 0 ? splits : grid_z;
    if (step.is_prefill) {
      launch_attention_prefill(p, heads_.dim, (uint32_t)step.tiles.size(), z);
    } else {
      launch_attention(p, heads_.dim, (uint32_t)step.tiles.size(), z);
    }
    launch_attention_merge(p, heads_.dim, padded);
    const std::vector<float> ml = partial_ml.values();
    bool clean = true;
    for (uint32_t token = 0; token < padded; token++) {
      const uint32_t own = token < tokens ? step.positions[token] / 256 + 1 : 0;
      for (uint32_t head = 0; head < heads_.heads; head++) {
        const float *its = &ml[((size_t)token * heads_.heads + head) * splits * 2];
        clean = clean && is_untouched(its + own * 2, (splits - own) * 2);
      }
    }
    check(clean, what + ": wrote a split beyond a token's own position");
    return y.values();
  }

  std::vector<double> refer(uint32_t sequence, uint32_t position) {
    std::vector<double> &known = referred_[{sequence, position}];
    if (!known.empty()) {
      return known;
    }
    const uint32_t dim = heads_.dim, group = heads_.heads / heads_.kv_heads;
    std::vector<double> weights(position + 1);
    for (uint32_t head = 0; head < heads_.heads; head++) {
      const fb_bf16 *q = &q_[sequence][((size_t)position * heads_.heads + head) * dim];
      double max = -INFINITY, sum = 0;
      for (uint32_t i = 0; i <= position; i++) {
        const fb_bf16 *k = &k_[sequence][((size_t)i * heads_.kv_heads + head / group) * dim];
        double score = 0;
        for (uint32_t j = 0; j < dim; j++) {
          score += from_bf16(q[j]) * from_bf16(k[j]);
        }
        weights[i] = score / sqrt(dim);
        max = std::max(max, weights[i]);
      }
      std::vector<double> o(dim);
      for (uint32_t i = 0; i <= position; i++) {
        const fb_bf16 *v = &v_[sequence][((size_t)i * heads_.kv_heads + head / group) * dim];
        const double weight = exp(weights[i] - max);
        sum += weight;
        for (uint32_t j = 0; j < dim; j++) {
          o[j] += weight * from_bf16(v[j]);
        }
      }
      for (uint32_t j = 0; j < dim; j++) {
        known.push_back(o[j] / sum);
      }
    }
    return known;
  }

  Heads heads_;
  uint32_t length_;
  Random random_;
  std::string name_;
  std::vector<std::vector<fb_bf16>> q_, k_, v_;
  std::map<std::pair<uint32_t, uint32_t>, std::vector<fb_bf16>> known_;
  std::map<std::pair<uint32_t, uint32_t>, std::vector<double>> referred_;
};

void heads_case(Heads heads, bool is_short) {
  Scene scene(heads, 3, 1100);
  scene.check_step({{0, 0, 1}}, "the first token");
  scene.check_step({{0, 63, 1}, {1, 64, 1}, {2, 65, 1}}, "decode about the end of a block");
  scene.check_step({{0, 0, 37}, {1, 50, 30}, {2, 250, 20}}, "prefill");
  scene.check_step({{1, 64, 1}, {2, 255, 1}, {0, 36, 1}, {2, 256, 1}, {1, 79, 1}},
                   "decode where prefill was");
  if (is_short) {
    return;
  }
  scene.check_step({{2, 260, 10}, {0, 20, 41}, {1, 1, 1}}, "prefill in other chunks");
  scene.check_step({{0, 511, 1}, {1, 512, 1}, {2, 1099, 1}, {0, 1, 1}}, "long contexts");
  scene.check_step({{2, 1096, 4}, {0, 500, 20}}, "long contexts, two splits at a time", 2);
  scene.check_step({{2, 1099, 1}}, "a long context alone, a split at a time", 1);
}

// Every so many contexts up to `length`, each decoded alone where a prefill in chunks was.
void contexts_case(Heads heads, uint32_t length, uint32_t every) {
  Scene scene(heads, 1, length);
  const uint32_t chunk = 93;
  for (uint32_t first = 0; first < length; first += chunk) {
    scene.check_step({{0, first, std::min(chunk, length - first)}}, "a chunk of a prefill");
  }
  std::vector<Part> parts;
  for (uint32_t position = 0; position < length; position += every) {
    parts.push_back({0, position, 1});
    if (parts.size() == 64 || position + every >= length) {
      scene.check_step(parts, "decode in many contexts");
      parts.clear();
    }
  }
}

} // namespace

void test_attention(bool subset) {
  heads_case({9, 3, 64}, subset);
  heads_case({4, 1, 128}, subset);
  if (!subset) {
    heads_case({2, 2, 64}, true);
    heads_case({16, 2, 128}, true);
    heads_case({6, 2, 96}, false);
    heads_case({16, 1, 64}, true);
    heads_case({14, 2, 64}, true);
    heads_case({40, 5, 64}, true); // more heads than the merge has warps
    contexts_case({3, 1, 64}, device->is_gpu() ? 1100 : 330, device->is_gpu() ? 1 : 7);
  }
  if (device->is_gpu() && !subset) {
    heads_case({32, 8, 128}, false);
  }
}
