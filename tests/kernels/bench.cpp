// Timings: copy bandwidth, then each kernel on the shapes of Llama-3-8B.
//
// A kernel is captured many times into one graph, each time with other weights or blocks, so that
// they come from memory and launches cost what they cost in a graph; the median of several replays,
// divided by the launches, is its time.
#include "bench.h"

#include <stdlib.h>
#include <time.h>

bool Report::write(const char *path) const {
  FILE *file = fopen(path, "w");
  if (file == nullptr) {
    perror(path);
    return false;
  }
  fprintf(file, "[\n");
  for (size_t i = 0; i < entries_.size(); i++) {
    fprintf(file, "  {");
    for (size_t j = 0; j < entries_[i].size(); j++) {
      fprintf(file, "%s\"%s\": %s", j > 0 ? ", " : "", entries_[i][j].first.c_str(),
              entries_[i][j].second.c_str());
    }
    fprintf(file, "}%s\n", i + 1 < entries_.size() ? "," : "");
  }
  fprintf(file, "]\n");
  return fclose(file) == 0;
}

Pool::Pool(size_t bytes) : memory_(bytes) {
  Random random(1);
  const std::vector<fb_bf16> pattern = random_bf16(random, 8 << 20, 1.0 / 16);
  size_t filled = std::min(bytes, pattern.size() * 2);
  device->upload(memory_.at(), pattern.data(), filled);
  while (filled < bytes) {
    const size_t more = std::min(filled, bytes - filled);
    device->copy(memory_.at() + filled, memory_.at(), more);
    filled += more;
  }
  device->synchronise();
}

uint8_t *Pool::take_bytes(size_t bytes) {
  if (next_ + bytes > memory_.count()) {
    next_ = 0;
  }
  uint8_t *taken = memory_.at() + next_;
  next_ += (bytes + 255) / 256 * 256;
  return taken;
}

namespace {

constexpr int kReplays = 7;

double seconds_each(int launches, const std::function<void(int)> &launch) {
  return median(device->time_replays(
             [&] {
               for (int i = 0; i < launches; i++) {
                 launch(i);
               }
             },
             kReplays)) /
         launches;
}

double copy_bytes_per_second(Pool &pool) {
  const size_t half = std::min<size_t>(pool.bytes() / 2, 2ull << 30);
  const auto copy = [&] {
    device->copy((uint8_t *)pool.start() + half, pool.start(), half);
  };
  device->time_runs(copy, 2);
  return 2.0 * half / median(device->time_runs(copy, 9));
}

struct Shape {
  const char *name;
  Epilogue epilogue;
  uint32_t rows, columns;
};

// Everything that a product needs besides its weight.
struct Activations {
  Array<fb_bf16> x, y16, kv;
  Array<float> y32, rope;
  Array<uint32_t> positions, places, count;
  explicit Activations(uint32_t tokens)
      : x(make(tokens)), y16((size_t)tokens * kFfn), kv(kBlockElements * (tokens / 64 + 1)),
        y32(std::vector<float>((size_t)tokens * kVocab)), rope(std::vector<float>(2 * kHeadDim)),
        positions(std::vector<uint32_t>(tokens)), places(places_of(tokens)),
        count(std::vector<uint32_t>{tokens}) {}
  static std::vector<fb_bf16> make(uint32_t tokens) {
    Random random(2);
    return random_bf16(random, (size_t)tokens * kFfn);
  }
  static std::vector<uint32_t> places_of(uint32_t tokens) {
    std::vector<uint32_t> places(tokens);
    for (uint32_t i = 0; i < tokens; i++) {
      places[i] = i;
    }
    return places;
  }
  fb_gemm params(const fb_weight &weight) const {
    return {weight,    x.at(),      count.at(),     0,           0,
            y32.at(),  y16.at(),    rope.at(),      positions.at(), places.at(),
            kv.at(),   kHeads,      kKvHeads,       kHeadDim,    kHeadDim};
  }
};

void bench_gemm(Report &report, Pool &pool, double copy_bandwidth) {
  const Shape shapes[] = {{"qkv", QKV, kQkvRows, kHidden},
                          {"o", RESIDUAL, kHidden, kHidden},
                          {"gate|up", SWIGLU, 2 * kFfn, kHidden},
                          {"down", RESIDUAL, kHidden, kFfn},
                          {"lm_head", STORE, kVocab, kHidden}};
  printf("\n%-22s %6s %10s %10s %7s %9s\n", "gemm, Llama-3-8B", "T", "us", "GB/s", "share",
         "TFLOP/s");
  for (const uint32_t tokens : {1u, 8u, 32u, 64u, 512u}) {
    const Activations activations(tokens);
    const uint32_t n = columns_for(tokens);
    for (uint32_t type = 0; type < 4; type++) {
      for (const Shape &shape : shapes) {
        const size_t bytes = weight_bytes(type, shape.rows, shape.columns);
        // Four times an L2 of 50 MB, at least.
        const int launches = (int)std::min<size_t>(std::max<size_t>(200000000 / bytes + 1, 8), 40);
        const double seconds = seconds_each(launches, [&](int) {
          fb_gemm p = activations.params(pool_weight(pool, type, shape.rows, shape.columns));
          launch_gemm(p, shape.epilogue, n, tokens);
        });
        const double rate = bytes / seconds;
        const double flops = 2.0 * shape.rows * shape.columns * tokens / seconds;
        const std::string name = std::string(type_names[type]) + " " + shape.name;
        printf("%-22s %6u %10.2f %10.0f %6.0f%% %9.1f\n", name.c_str(), tokens, seconds * 1e6,
               rate * 1e-9, 100 * rate / copy_bandwidth, flops * 1e-12);
        report.add({{"kernel", quoted("gemm")},
                    {"type", quoted(type_names[type])},
                    {"shape", quoted(shape.name)},
                    {"tokens", number(tokens)},
                    {"us", number(seconds * 1e6)},
                    {"weight_gb_per_s", number(rate * 1e-9)},
                    {"share_of_copy", number(rate / copy_bandwidth)},
                    {"tflop_per_s", number(flops * 1e-12)}});
      }
    }
  }
}

// Rows of `count` tokens that end at `context`, on blocks all over the pool.
struct AttentionRun {
  static constexpr int kLaunches = 16;
  uint32_t tokens, splits, tile_count;
  Array<fb_bf16> q, y;
  Array<fb_row> rows;
  Array<uint32_t> blocks, positions;
  Array<fb_query_tile> tiles;
  Array<fb_step> step;
  Array<float> partial_o, partial_ml;

  AttentionRun(Pool &pool, uint32_t batch, uint32_t count, uint32_t context)
      : tokens(batch * count), splits((context + 255) / 256) {
    Random random(5);
    const uint32_t total = (uint32_t)(pool.bytes() / 2 / kBlockElements);
    std::vector<uint32_t> order(total);
    for (uint32_t i = 0; i < total; i++) {
      order[i] = i;
      std::swap(order[i], order[random.below(i + 1)]);
    }
    // A launch after the other on other blocks; in one launch they are all different if they fit.
    const uint32_t each = (context + 63) / 64;
    std::vector<uint32_t> table, at;
    std::vector<fb_row> all_rows;
    std::vector<fb_query_tile> all_tiles;
    for (uint32_t launch = 0; launch < kLaunches; launch++) {
      for (uint32_t row = 0; row < batch; row++) {
        all_rows.push_back({row * count, count, context - count, (uint32_t)table.size(), 0, 0});
        for (uint32_t i = 0; i < each; i++) {
          table.push_back(order[table.size() % total]);
        }
      }
    }
    const uint32_t tile = tile_tokens(kHeads, kKvHeads);
    for (uint32_t row = 0; row < batch; row++) {
      for (uint32_t first = 0; first < count; first += tile) {
        all_tiles.push_back({row, first});
      }
      for (uint32_t i = 0; i < count; i++) {
        at.push_back(context - count + i);
      }
    }
    tile_count = (uint32_t)all_tiles.size();
    q = Array<fb_bf16>(random_bf16(random, (size_t)tokens * kHidden));
    y = Array<fb_bf16>((size_t)tokens * kHidden);
    rows = Array<fb_row>(all_rows);
    blocks = Array<uint32_t>(table);
    positions = Array<uint32_t>(at);
    tiles = Array<fb_query_tile>(all_tiles);
    step = Array<fb_step>(std::vector<fb_step>{{tokens, batch, 0, 0}});
    partial_o = Array<float>((size_t)tokens * kHidden * splits);
    partial_ml = Array<float>((size_t)tokens * kHeads * splits * 2);
  }
  fb_attention params(const Pool &pool, int launch) const {
    const size_t batch = rows.count() / kLaunches;
    return {q.at(),          pool.start(),     rows.at() + launch * batch, blocks.at(),
            tiles.at(),      positions.at(),   step.at(),                  partial_o.at(),
            partial_ml.at(), y.at(),           kHeads,                     kKvHeads,
            splits,          (float)(1.4426950408889634 / sqrt(kHeadDim))};
  }
};

void report_attention(Report &report, const char *kernel, uint32_t batch, uint32_t count,
                      uint32_t context, double seconds, double merge, double copy_bandwidth) {
  const double rate = (double)batch * context * kPositionBytes / seconds;
  printf("%-22s %6u %8u %10.2f %10.2f %10.0f %6.0f%%\n", kernel, batch * count, context,
         seconds * 1e6, merge * 1e6, rate * 1e-9, 100 * rate / copy_bandwidth);
  report.add({{"kernel", quoted(kernel)},
              {"tokens", number(batch * count)},
              {"rows", number(batch)},
              {"context", number(context)},
              {"us", number(seconds * 1e6)},
              {"merge_us", number(merge * 1e6)},
              {"kv_gb_per_s", number(rate * 1e-9)},
              {"share_of_copy", number(rate / copy_bandwidth)}});
}

void bench_attention(Report &report, Pool &pool, double copy_bandwidth) {
  printf("\n%-22s %6s %8s %10s %10s %10s %7s\n", "attention, 32/8 x 128", "T", "context", "us",
         "merge us", "KV GB/s", "share");
  for (const uint32_t batch : {1u, 8u, 32u, 64u}) {
    for (const uint32_t context : {256u, 2048u, 8192u}) {
      const AttentionRun run(pool, batch, 1, context);
      const double seconds = seconds_each(AttentionRun::kLaunches, [&](int i) {
        launch_attention(run.params(pool, i), kHeadDim, run.tile_count, run.splits);
      });
      const double merge = seconds_each(AttentionRun::kLaunches, [&](int i) {
        launch_attention_merge(run.params(pool, i), kHeadDim, run.tokens);
      });
      report_attention(report, "attention", batch, 1, context, seconds, merge, copy_bandwidth);
    }
  }
  for (const uint32_t context : {512u, 2048u, 8192u}) {
    const AttentionRun run(pool, 1, 512, context);
    const double seconds = seconds_each(AttentionRun::kLaunches, [&](int i) {
      launch_attention_prefill(run.params(pool, i), kHeadDim, run.tile_count, run.splits);
    });
    const double merge = seconds_each(AttentionRun::kLaunches, [&](int i) {
      launch_attention_merge(run.params(pool, i), kHeadDim, run.tokens);
    });
    report_attention(report, "attention_prefill", 1, 512, context, seconds, merge, copy_bandwidth);
  }
}

void report_small(Report &report, const std::string &name, uint32_t count, double seconds) {
  printf("%-32s %6u %10.2f\n", name.c_str(), count, seconds * 1e6);
  report.add({{"kernel", quoted(name)}, {"count", number(count)}, {"us", number(seconds * 1e6)}});
}

void bench_small(Report &report, Pool &pool) {
  printf("\n%-32s %6s %10s\n", "others", "rows", "us");
  const uint32_t most = 512;
  Random random(6);
  const Array<float> x(random_f32(random, (size_t)most * kHidden)), weight(random_f32(random, kHidden));
  const Array<fb_bf16> y((size_t)most * kHidden);
  const Array<float> embedded((size_t)most * kHidden);
  std::vector<uint32_t> ids(most);
  for (uint32_t &id : ids) {
    id = random.below(kVocab);
  }
  const Array<uint32_t> ids_at(ids);
  for (const uint32_t rows : {1u, 64u, 512u}) {
    const Array<fb_step> step(std::vector<fb_step>{{rows, rows, rows, 0}});
    report_small(report, "rmsnorm", rows, seconds_each(40, [&](int) {
                   device->run("forebay_rmsnorm", {rows}, 256, 0,
                               fb_rmsnorm{x.at(), weight.at(), nullptr, y.at(),
                                          &step.at()->tokens, kHidden, 1e-5f});
                 }));
    for (const uint32_t type : {FB_BF16, FB_Q8}) {
      report_small(report, std::string("embed ") + type_names[type], rows, seconds_each(8, [&](int) {
                     device->run("forebay_embed", {rows}, 128, 0,
                                 fb_embed{pool_weight(pool, type, kVocab, kHidden), step.at(),
                                          ids_at.at(), ids_at.at(), ids_at.at(), embedded.at()});
                   }));
    }
  }
}

void bench_sampling(Report &report) {
  const uint32_t most = 64;
  Random random(7);
  const Array<float> logits(random_f32(random, (size_t)most * kVocab, 2.5));
  const Array<uint32_t> counts(std::vector<uint32_t>((size_t)most * kVocab)), last(most);
  std::vector<uint32_t> sampled_rows;
  std::vector<fb_row> rows;
  for (uint32_t i = 0; i < most; i++) {
    sampled_rows.push_back(i);
    rows.push_back({i, 1, 100 + i, 0, i, i});
  }
  const Array<uint32_t> sampled_rows_at(sampled_rows);
  const Array<fb_row> rows_at(rows);
  const Array<fb_bias> biases(1);
  const Array<fb_sampled> results_at(most);
  const struct {
    const char *name;
    fb_slot slot;
  } kinds[] = {{"sample greedy", {1, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0}},
               {"sample plain", {1, 1, 1, 0, 1, 0, 0, 0, 0, 0, 0}},
               {"sample top-p 0.9", {1, 1, 0.9f, 0, 1, 0, 0, 0, 0, 0, 0}},
               {"sample top-k 40", {1, 1, 1, 0, 1, 0, 0, 40, 0, 0, 0}},
               {"sample penalties, 5 logprobs", {1, 1, 0.9f, 0, 1.1f, 0, 0, 0, 0, 0, 6}}};
  for (const auto &kind : kinds) {
    const Array<fb_slot> slots(std::vector<fb_slot>(most, kind.slot));
    for (const uint32_t sampled : {1u, 64u}) {
      const Array<fb_step> step(std::vector<fb_step>{{sampled, sampled, sampled, 0}});
      report_small(report, kind.name, sampled, seconds_each(20, [&](int) {
                     device->run("forebay_sample", {sampled}, 1024, 0,
                                 fb_sample{logits.at(), sampled_rows_at.at(), rows_at.at(),
                                           step.at(), slots.at(), biases.at(), counts.at(),
                                           last.at(), results_at.at(), kVocab, 0});
                   }));
    }
  }
}

} // namespace

int bench(const char *json) {
  device->is_careful = false;
  const size_t bytes = 18ull << 30; // the 8B model in bf16
  if (!device->fits(bytes)) {
    fprintf(stderr, "less than 18 GiB are free: no timings\n");
    return 1;
  }
  Report report;
  Pool pool(bytes);
  const double copy_bandwidth = copy_bytes_per_second(pool);
  const time_t now = time(nullptr);
  char date[40];
  strftime(date, sizeof(date), "%FT%TZ", gmtime(&now));
  printf("\n%s, %s: copies at %.0f GB/s (read and written)\n", device->name().c_str(), date,
         copy_bandwidth * 1e-9);
  const char *driver = getenv("FOREBAY_DRIVER");
  report.add({{"device", quoted(device->name())},
              {"driver", quoted(driver != nullptr ? driver : "")},
              {"date", quoted(date)},
              {"copy_gb_per_s", number(copy_bandwidth * 1e-9)}});
  bench_gemm(report, pool, copy_bandwidth);
  bench_attention(report, pool, copy_bandwidth);
  bench_small(report, pool);
  bench_sampling(report);
  bench_steps(report, pool, copy_bandwidth);
  return json == nullptr || report.write(json) ? 0 : 1;
}
