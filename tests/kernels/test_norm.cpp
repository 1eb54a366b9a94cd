// Norm and embedding against f64.
#include "reference.h"

namespace {

void norm_case(uint32_t columns, uint32_t rows, uint32_t real, bool gathered) {
  const std::string what = "rmsnorm of " + std::to_string(columns) + " columns" +
                           (gathered ? ", gathered" : "");
  Random random(columns + rows);
  const std::vector<float> x = random_f32(random, (size_t)rows * columns, 3);
  const std::vector<float> weight = random_f32(random, columns);
  std::vector<uint32_t> gather(rows);
  for (uint32_t row = 0; row < rows; row++) {
    gather[row] = row == 1 ? FB_NONE : (row * 7 + 3) % rows;
  }
  const float eps = 1e-5f;
  Array<float> x_at(x), weight_at(weight);
  Array<uint32_t> gather_at(gather), count(std::vector<uint32_t>{real});
  Array<fb_bf16> y((size_t)rows * columns);
  device->run("forebay_rmsnorm", {rows}, 256, 0,
              fb_rmsnorm{x_at.at(), weight_at.at(), gathered ? gather_at.at() : nullptr, y.at(),
                         count.at(), columns, eps});
  const std::vector<fb_bf16> got = y.values();
  for (uint32_t row = 0; row < rows; row++) {
    const uint32_t from = gathered ? gather[row] : row;
    const fb_bf16 *its = &got[(size_t)row * columns];
    if (row >= real || from == FB_NONE) {
      check(is_untouched(its, columns), what + ": a row that is not real was written");
      continue;
    }
    double squares = 0;
    for (uint32_t i = 0; i < columns; i++) {
      const double value = x[(size_t)from * columns + i];
      squares += value * value;
    }
    const double scale = 1 / sqrt(squares / columns + eps);
    std::vector<double> want(columns);
    uint32_t off = 0;
    for (uint32_t i = 0; i < columns; i++) {
      want[i] = x[(size_t)from * columns + i] * scale * weight[i];
      // Rounded right but for values next to the middle of two bf16 numbers.
      const double middle = fabs(from_bf16(its[i]) - want[i]);
      off += !(middle <= fabs(want[i]) * (0x1p-8 + 1e-6));
    }
    check_close(widened({its, its + columns}), want, 3e-3, what);
    check(off == 0, what + ": a value is not the nearest bf16 within 1e-6");
  }
}

void embed_case(uint32_t type, uint32_t columns) {
  const std::string what = std::string("embedding in ") + type_names[type];
  const uint32_t vocab = 75, tokens = 9, real = 8;
  Random random(type + columns);
  const Packed table = random_weight(random, type, vocab, columns);
  const DeviceWeight weight(table);
  const std::vector<uint32_t> ids = {0, 74, FB_NONE, 15, 16, 8, 7, FB_NONE, 3};
  const std::vector<uint32_t> slots = {0, 1, 2, 3, 0, 1, 2, 1, 0}, last = {70, 71, 33, 73};
  Array<uint32_t> ids_at(ids), slots_at(slots), last_at(last);
  Array<fb_step> step(std::vector<fb_step>{{real, 0, 0, 0}});
  Array<float> x((size_t)tokens * columns);
  device->run("forebay_embed", {tokens}, 128, 0,
              fb_embed{weight.weight, step.at(), ids_at.at(), slots_at.at(), last_at.at(), x.at()});
  const std::vector<float> got = x.values();
  for (uint32_t token = 0; token < tokens; token++) {
    const float *its = &got[(size_t)token * columns];
    if (token >= real) {
      check(is_untouched(its, columns), what + ": a padded token was written");
      continue;
    }
    const uint32_t id = ids[token] == FB_NONE ? last[slots[token]] : ids[token];
    bool same = true;
    for (uint32_t i = 0; i < columns; i++) {
      // d q is exact in f32; d q + m is rounded once.
      same = same && its[i] == (float)table.at(id, i);
    }
    check(same, what + ": token " + std::to_string(token) + " differs");
  }
}

} // namespace

void test_norm_and_embedding(bool subset) {
  norm_case(576, 5, 4, false);
  norm_case(4096, 4, 4, true);
  if (!subset) {
    norm_case(8, 2, 1, false);
    norm_case(16384, 2, 2, false);
    norm_case(1028, 3, 3, true);
  }
  for (uint32_t type = 0; type < 4; type++) {
    embed_case(type, 576);
    embed_case(type, 32);
  }
}
