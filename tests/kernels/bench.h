// What timings share: memory to read from, medians, and where results go.
#pragma once

#include <algorithm>

#include "attention.h"
#include "gemm.h"
#include "reference.h"

inline double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values.empty() ? 0 : values[values.size() / 2];
}

// Results as lines of a table on the way and as JSON in the end.
class Report {
public:
  // Text that goes into the JSON as it is: numbers, or strings in quotes.
  typedef std::vector<std::pair<std::string, std::string>> Fields;
  void add(Fields fields) { entries_.push_back(std::move(fields)); }
  bool write(const char *path) const;

private:
  std::vector<Fields> entries_;
};

inline std::string quoted(const std::string &text) { return "\"" + text + "\""; }
inline std::string number(double value) {
  char text[40];
  snprintf(text, sizeof(text), "%.6g", value);
  return text;
}

// Device memory full of bf16 numbers of ordinary size, which do as weights of every type, as
// scales, and as keys and values. take() goes round in it, so that what is read was not read
// lately.
class Pool {
public:
  explicit Pool(size_t bytes);
  template <typename T> T *take(size_t count) { return (T *)take_bytes(count * sizeof(T)); }
  fb_bf16 *start() const { return (fb_bf16 *)memory_.at(); }
  size_t bytes() const { return memory_.count(); }

private:
  uint8_t *take_bytes(size_t bytes);
  Array<uint8_t> memory_;
  size_t next_ = 0;
};

inline size_t tile_bytes(uint32_t type, size_t rows, size_t columns) {
  return rows * columns * (type == FB_BF16 ? 4 : type == FB_Q8 ? 2 : 1) / 2;
}
inline size_t scale_count(uint32_t type, size_t rows, size_t columns) {
  return type == FB_BF16 ? 0 : rows * columns / (type == FB_Q4M ? 16 : 32);
}
inline size_t weight_bytes(uint32_t type, size_t rows, size_t columns) {
  return tile_bytes(type, rows, columns) + 2 * scale_count(type, rows, columns);
}
inline fb_weight pool_weight(Pool &pool, uint32_t type, uint32_t rows, uint32_t columns) {
  const size_t scales = scale_count(type, rows, columns);
  return {pool.take<uint8_t>(tile_bytes(type, rows, columns)),
          scales == 0 ? nullptr : pool.take<fb_f16>(scales), rows, columns, type, 0};
}
inline uint32_t columns_for(uint32_t tokens) {
  return tokens <= 8 ? 8 : tokens <= 16 ? 16 : tokens <= 32 ? 32 : 64;
}

// Llama-3-8B.
constexpr uint32_t kHidden = 4096, kFfn = 14336, kVocab = 128256, kHeads = 32, kKvHeads = 8,
                   kHeadDim = 128, kLayers = 32;
constexpr uint32_t kQkvRows = (kHeads + 2 * kKvHeads) * kHeadDim;
constexpr size_t kBlockElements = (size_t)kKvHeads * 2 * FB_BLOCK_POSITIONS * kHeadDim;
constexpr size_t kPositionBytes = (size_t)kKvHeads * 2 * kHeadDim * 2; // of a layer

void bench_steps(Report &report, Pool &pool, double copy_bandwidth);
int bench(const char *json);
