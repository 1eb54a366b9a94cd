// A decode step of a whole model of Llama-3-8B's shape with random weights, as the engine would
// launch it: every kernel in its order, captured in a graph, or launched one by one.
#include "bench.h"

namespace {

struct Layer {
  fb_weight qkv, o, gate_up, down;
};

class Model {
public:
  Model(Pool &pool, uint32_t type) : type_(type) {
    embedding_ = pool_weight(pool, type, kVocab, kHidden);
    head_ = pool_weight(pool, type, kVocab, kHidden);
    bytes_ = weight_bytes(type, kVocab, kHidden);
    for (Layer &layer : layers_) {
      layer = {pool_weight(pool, type, kQkvRows, kHidden), pool_weight(pool, type, kHidden, kHidden),
               pool_weight(pool, type, 2 * kFfn, kHidden), pool_weight(pool, type, kHidden, kFfn)};
      bytes_ += weight_bytes(type, kQkvRows, kHidden) + weight_bytes(type, kHidden, kHidden) +
                weight_bytes(type, 2 * kFfn, kHidden) + weight_bytes(type, kHidden, kFfn);
    }
  }
  uint32_t type_;
  fb_weight embedding_, head_;
  Layer layers_[kLayers];
  size_t bytes_; // read by a step
};

// Buffers of a step of `rows` decode rows that all stand at the end of `context`.
class Step {
public:
  Step(Pool &cache, uint32_t rows, uint32_t context)
      : rows_(rows), splits_((context + 255) / 256), ones_(std::vector<float>(kHidden, 1.0f)),
        rope_(rope(context)), x_((size_t)rows * kHidden), logits_((size_t)rows * kVocab),
        partial_o_((size_t)rows * kHidden * splits_),
        partial_ml_((size_t)rows * kHeads * splits_ * 2), normed_((size_t)rows * kHidden),
        q_((size_t)rows * kHidden), mixed_((size_t)rows * kHidden), gated_((size_t)rows * kFfn),
        step_(std::vector<fb_step>{{rows, rows, rows, 0}}),
        counts_(std::vector<uint32_t>((size_t)rows * kVocab)),
        slots_(std::vector<fb_slot>(rows, {1, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0})), biases_(1),
        results_(rows) {
    const uint32_t each = (context + 63) / 64;
    layer_elements_ = std::min((size_t)rows * each * kBlockElements,
                               cache.bytes() / 2 / kLayers / kBlockElements * kBlockElements);
    const uint32_t blocks = (uint32_t)(layer_elements_ / kBlockElements);
    cache_ = cache.start();
    Random random(rows + context);
    std::vector<uint32_t> table, positions, places, ids, indices;
    std::vector<fb_row> states;
    std::vector<fb_query_tile> tiles;
    for (uint32_t row = 0; row < rows; row++) {
      states.push_back({row, 1, context - 1, row * each, row, row});
      for (uint32_t i = 0; i < each; i++) {
        // 1663 is odd, so it goes through all blocks of a power of two in a mixed order.
        table.push_back((uint32_t)((row * each + i) * 1663ull % blocks));
      }
      positions.push_back(context - 1);
      places.push_back(table.back() * 64 + (context - 1) % 64);
      ids.push_back(random.below(kVocab));
      indices.push_back(row);
      tiles.push_back({row, 0});
    }
    table_ = Array<uint32_t>(table);
    positions_ = Array<uint32_t>(positions);
    places_ = Array<uint32_t>(places);
    ids_ = Array<uint32_t>(ids);
    indices_ = Array<uint32_t>(indices);
    last_ = Array<uint32_t>(ids);
    states_ = Array<fb_row>(states);
    tiles_ = Array<fb_query_tile>(tiles);
  }

  void launch(const Model &model) const {
    device->run("forebay_embed", {rows_}, 128, 0,
                fb_embed{model.embedding_, step_.at(), ids_.at(), indices_.at(), last_.at(),
                         x_.at()});
    for (uint32_t i = 0; i < kLayers; i++) {
      const Layer &layer = model.layers_[i];
      fb_bf16 *kv = cache_ + i * layer_elements_;
      norm();
      gemm(layer.qkv, QKV, normed_, nullptr, q_.at(), kv);
      const fb_attention p = {q_.at(),          kv,
                              states_.at(),     table_.at(),
                              tiles_.at(),      positions_.at(),
                              step_.at(),       partial_o_.at(),
                              partial_ml_.at(), mixed_.at(),
                              kHeads,           kKvHeads,
                              splits_,          (float)(1.4426950408889634 / sqrt(kHeadDim))};
      launch_attention(p, kHeadDim, rows_, splits_);
      launch_attention_merge(p, kHeadDim, rows_);
      gemm(layer.o, RESIDUAL, mixed_, x_.at(), nullptr, nullptr);
      norm();
      gemm(layer.gate_up, SWIGLU, normed_, nullptr, gated_.at(), nullptr);
      gemm(layer.down, RESIDUAL, gated_, x_.at(), nullptr, nullptr);
    }
    norm();
    gemm(model.head_, STORE, normed_, logits_.at(), nullptr, nullptr);
    device->run("forebay_sample", {rows_}, 1024, 0,
                fb_sample{logits_.at(), indices_.at(), states_.at(), step_.at(), slots_.at(),
                          biases_.at(), counts_.at(), last_.at(), results_.at(), kVocab, 0});
  }
  static constexpr int kLaunches = 1 + 8 * (int)kLayers + 3;

private:
  static std::vector<float> rope(uint32_t context) {
    std::vector<float> table((size_t)context * kHeadDim);
    for (size_t i = 0; i < table.size(); i += 2) {
      const double angle = (double)(i / kHeadDim) * pow(500000, -(double)(i % kHeadDim) / kHeadDim);
      table[i] = (float)cos(angle);
      table[i + 1] = (float)sin(angle);
    }
    return table;
  }
  void norm() const {
    device->run("forebay_rmsnorm", {rows_}, 256, 0,
                fb_rmsnorm{x_.at(), ones_.at(), nullptr, normed_.at(), &step_.at()->tokens,
                           kHidden, 1e-5f});
  }
  void gemm(const fb_weight &weight, Epilogue epilogue, const Array<fb_bf16> &x, float *y32,
            fb_bf16 *y16, fb_bf16 *kv) const {
    fb_gemm p = {weight,    x.at(),          &step_.at()->tokens, 0,  0,      y32,      y16,
                 rope_.at(), positions_.at(), places_.at(),        kv, kHeads, kKvHeads, kHeadDim,
                 kHeadDim};
    launch_gemm(p, epilogue, columns_for(rows_), rows_);
  }

  uint32_t rows_, splits_;
  size_t layer_elements_;
  fb_bf16 *cache_;
  Array<float> ones_, rope_, x_, logits_, partial_o_, partial_ml_;
  Array<fb_bf16> normed_, q_, mixed_, gated_;
  Array<fb_step> step_;
  Array<uint32_t> counts_, table_, positions_, places_, ids_, indices_, last_;
  Array<fb_slot> slots_;
  Array<fb_bias> biases_;
  Array<fb_sampled> results_;
  Array<fb_row> states_;
  Array<fb_query_tile> tiles_;
};

void bench_step(Report &report, const Model &model, const Step &step, uint32_t rows,
                uint32_t context, double copy_bandwidth) {
  const auto launch = [&] { step.launch(model); };
  device->time_runs(launch, 2);
  const double graph = median(device->time_replays(launch, 9));
  const double launched = median(device->time_runs(launch, 7));
  const double bytes = model.bytes_ + (double)rows * context * kPositionBytes * kLayers;
  const double share = bytes / graph / copy_bandwidth;
  printf("%-6s %5u %8u %10.3f %12.1f %7.0f%% %14.3f\n", type_names[model.type_], rows, context,
         graph * 1e3, rows / graph, 100 * share, launched * 1e3);
  fflush(stdout);
  report.add({{"kernel", quoted("step")},
              {"type", quoted(type_names[model.type_])},
              {"rows", number(rows)},
              {"context", number(context)},
              {"launches", number(Step::kLaunches)},
              {"graph_ms", number(graph * 1e3)},
              {"tokens_per_s", number(rows / graph)},
              {"share_of_copy", number(share)},
              {"launched_ms", number(launched * 1e3)}});
}

} // namespace

void bench_steps(Report &report, Pool &pool, double copy_bandwidth) {
  const size_t cache_bytes = 64 * 2048 * kPositionBytes * kLayers;
  if (!device->fits(cache_bytes + (1ull << 30))) {
    printf("\nno memory for the cache of whole steps: they are left out\n");
    return;
  }
  Pool cache(cache_bytes);
  printf("\nA decode step of Llama-3-8B's shape, %d launches, %u layers, greedy\n", Step::kLaunches,
         kLayers);
  printf("%-6s %5s %8s %10s %12s %8s %14s\n", "type", "rows", "context", "graph ms", "tokens/s",
         "share", "no graph, ms");
  for (const uint32_t type : {FB_BF16, FB_Q8, FB_Q4}) {
    const Model model(pool, type);
    for (const uint32_t context : {256u, 2048u}) {
      for (const uint32_t rows : {1u, 8u, 32u, 64u}) {
        const Step step(cache, rows, context);
        bench_step(report, model, step, rows, context, copy_bandwidth);
      }
    }
  }
}
