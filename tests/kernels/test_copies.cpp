// Counts of a slot's history, and copies of KV blocks.
#include "reference.h"

namespace {

void count_case() {
  const uint32_t vocab = 1003, slots = 5;
  Random random(3);
  std::vector<uint32_t> counts((size_t)slots * vocab), history;
  for (uint32_t &count : counts) {
    count = random.below(9);
  }
  std::vector<uint32_t> want = counts;
  std::vector<fb_slot_setup> setups;
  for (const uint32_t slot : {3u, 0u, 4u}) {
    const uint32_t count = slot * 400, prompt = slot * 150;
    setups.push_back({slot, (uint32_t)history.size(), count, prompt});
    uint32_t *its = &want[(size_t)slot * vocab];
    std::fill_n(its, vocab, 0);
    for (uint32_t i = 0; i < count; i++) {
      const uint32_t token = random.below(50) == 0 ? vocab + i : random.below(300);
      history.push_back(token);
      if (token < vocab && i < prompt) {
        its[token] |= 1u << 31;
      } else if (token < vocab) {
        its[token]++;
      }
    }
  }
  Array<uint32_t> counts_at(counts), history_at(history);
  Array<fb_slot_setup> setups_at(setups);
  device->run("forebay_count", {4}, 256, 0,
              fb_count{setups_at.at(), history_at.at(), counts_at.at(), vocab, 3});
  check(counts_at.values() == want, "counts of slots that change hands");
}

void copy_case(uint64_t block_elements) {
  const uint32_t layers = 3, blocks = 6;
  Random random(4);
  const uint64_t layer_elements = block_elements * blocks;
  std::vector<fb_bf16> kv((size_t)layers * layer_elements);
  for (fb_bf16 &value : kv) {
    value = (fb_bf16)random.bits();
  }
  const std::vector<uint32_t> pairs = {0, 5, 3, 1};
  std::vector<fb_bf16> want = kv;
  for (uint32_t layer = 0; layer < layers; layer++) {
    for (size_t i = 0; i < pairs.size(); i += 2) {
      memcpy(&want[layer * layer_elements + pairs[i + 1] * block_elements],
             &kv[layer * layer_elements + pairs[i] * block_elements], block_elements * 2);
    }
  }
  Array<fb_bf16> kv_at(kv);
  Array<uint32_t> pairs_at(pairs);
  device->run("forebay_kv_copy", {2, layers}, 256, 0,
              fb_kv_copy{kv_at.at(), pairs_at.at(), layer_elements, block_elements});
  check(kv_at.values() == want, "copies of KV blocks");
}

} // namespace

void test_copies(bool) {
  count_case();
  copy_case(2 * 64 * 64);
  copy_case(3 * 2 * 64 * 96);
}
