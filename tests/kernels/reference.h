// Numbers, weights and comparisons of the kernel tests. The packer here is written from the text of
// kernels/abi.h alone, and shares nothing with the one that loads models.
#pragma once

#include <math.h>
#include <stdio.h>

#include <string>
#include <vector>

#include "../../kernels/abi.h"
#include "device.h"

// ----------------------------------------------------------------------------------------- numbers

class Random {
public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15ull + 1) {}
  uint64_t bits() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
  }
  uint32_t below(uint32_t count) { return (uint32_t)(bits() % count); }
  double unit() { return (double)(bits() >> 11) * 0x1p-53; }
  // Mean 0, variance 1, close to a bell.
  double bell() { return (unit() + unit() + unit() + unit() - 2) * 1.7320508; }

private:
  uint64_t state_;
};

inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline double from_bf16(uint16_t x) { return float_of((uint32_t)x << 16); }
// Rounded to the nearest, ties to even.
inline uint16_t to_bf16(double value) {
  const uint32_t bits = bits_of((float)value);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline double from_f16(uint16_t x) {
  const int exponent = x >> 10 & 31, rest = x & 1023;
  const double size = exponent == 0 ? ldexp(rest, -24) : ldexp(1024 + rest, exponent - 25);
  return x & 0x8000 ? -size : size;
}

inline std::vector<fb_bf16> random_bf16(Random &random, size_t count, double scale = 1) {
  std::vector<fb_bf16> values(count);
  for (fb_bf16 &value : values) {
    value = to_bf16(random.bell() * scale);
  }
  return values;
}
inline std::vector<float> random_f32(Random &random, size_t count, double scale = 1) {
  std::vector<float> values(count);
  for (float &value : values) {
    value = (float)(random.bell() * scale);
  }
  return values;
}

// ----------------------------------------------------------------------------------------- weights

enum RowOrder { PLAIN, ROPE_PAIRS, GATE_UP };

const char *const type_names[] = {"bf16", "q8", "q4", "q4m"};

// A random weight matrix: what it stands for, and its packed bytes.
struct Packed {
  uint32_t type, rows, columns;
  std::vector<double> values; // [rows][columns], gate's rows before up's
  std::vector<uint8_t> tiles;
  std::vector<fb_f16> scales;
  double at(size_t row, size_t column) const { return values[row * columns + column]; }
};

// The row that lies at place `place` of the tiles.
inline uint32_t row_at(RowOrder order, uint32_t rows, uint32_t place) {
  const uint32_t pair = place / 16 * 8 + place % 8, second = place % 16 / 8;
  switch (order) {
  case ROPE_PAIRS: return 2 * pair + second;
  case GATE_UP: return pair + second * (rows / 2);
  default: return place;
  }
}

inline Packed random_weight(Random &random, uint32_t type, uint32_t rows, uint32_t columns,
                            RowOrder order = PLAIN) {
  const uint32_t row_tiles = (rows + 15) / 16, column_tiles = columns / 32;
  const size_t tile_bytes[] = {1024, 512, 256, 256};
  Packed packed{type, rows, columns, std::vector<double>((size_t)rows * columns), {}, {}};
  packed.tiles.assign((size_t)row_tiles * column_tiles * tile_bytes[type], 0);
  const size_t scales = type == FB_BF16 ? 0 : type == FB_Q4M ? 32 : 16;
  packed.scales.assign((size_t)row_tiles * column_tiles * scales, 0);
  for (uint32_t place = 0; place < row_tiles * 16; place++) {
    const uint32_t tile_row = place % 16, row = row_at(order, rows, place);
    if (row >= rows || place >= (rows + 15) / 16 * 16) {
      continue; // zeros
    }
    for (uint32_t column_tile = 0; column_tile < column_tiles; column_tile++) {
      const size_t tile = (size_t)(place / 16) * column_tiles + column_tile;
      uint8_t *bytes = &packed.tiles[tile * tile_bytes[type]];
      // Exponents about 2^-6; now and then a small, a negative or no scale.
      uint16_t d = (uint16_t)((8 + random.below(2)) << 10 | random.below(1024));
      const uint32_t odd = random.below(64);
      d = odd == 0 ? 0 : odd == 1 ? (uint16_t)random.below(1024) : odd < 8 ? d | 0x8000 : d;
      const uint16_t m = (uint16_t)(random.below(2) << 15 | (9 + random.below(3)) << 10 |
                                    random.below(1024));
      if (type == FB_Q4M) {
        packed.scales[tile * 32 + tile_row % 8 * 4 + tile_row / 8] = d;
        packed.scales[tile * 32 + tile_row % 8 * 4 + 2 + tile_row / 8] = m;
      } else if (type != FB_BF16) {
        packed.scales[tile * 16 + tile_row % 8 * 2 + tile_row / 8] = d;
      }
      for (uint32_t column = 0; column < 32; column++) {
        // Whose lane, and which of its eight values of the step.
        const uint32_t step = column / 16, in_step = column % 16;
        const uint32_t lane = tile_row % 8 * 4 + in_step % 8 / 2;
        const uint32_t value = in_step / 8 * 4 + tile_row / 8 * 2 + in_step % 2;
        double w = 0;
        if (type == FB_BF16) {
          const uint16_t bits = to_bf16(random.bell() / 16);
          memcpy(bytes + ((step * 32 + lane) * 8 + value) * 2, &bits, 2);
          w = from_bf16(bits);
        } else if (type == FB_Q8) {
          const int q = (int)random.below(256) - 128;
          bytes[lane * 16 + step * 8 + value] = (uint8_t)q;
          w = from_f16(d) * q;
        } else {
          const uint32_t q = random.below(16);
          uint32_t word;
          memcpy(&word, bytes + lane * 8 + step * 4, 4);
          word |= q << (value / 2 * 4 + value % 2 * 16);
          memcpy(bytes + lane * 8 + step * 4, &word, 4);
          w = type == FB_Q4 ? from_f16(d) * ((int)q - 8) : from_f16(d) * q + from_f16(m);
        }
        packed.values[(size_t)row * columns + column_tile * 32 + column] = w;
      }
    }
  }
  return packed;
}

// A packed matrix on the device.
struct DeviceWeight {
  Array<uint8_t> tiles;
  Array<fb_f16> scales;
  fb_weight weight;
  explicit DeviceWeight(const Packed &packed) : tiles(packed.tiles), scales(packed.scales) {
    weight = {tiles.at(), scales.at(), packed.rows, packed.columns, packed.type, 0};
  }
};

// ------------------------------------------------------------------------------------- comparisons

// Test cases by name; a failed check names its case and what differed.
struct Results {
  int checks = 0, failures = 0;
};
extern Results results;

inline bool check(bool holds, const std::string &what) {
  results.checks++;
  if (!holds && results.failures++ < 40) {
    printf("FAILED  %s\n", what.c_str());
    fflush(stdout);
  }
  return holds;
}

// Relative l2 distance; infinite if anything is no number.
template <typename A> double distance(const std::vector<A> &got, const std::vector<double> &want) {
  double difference = 0, size = 0;
  for (size_t i = 0; i < want.size(); i++) {
    difference += (got[i] - want[i]) * (got[i] - want[i]);
    size += want[i] * want[i];
  }
  const double far = sqrt(difference / (size > 0 ? size : 1));
  return isfinite(far) ? far : INFINITY;
}

template <typename A>
bool check_close(const std::vector<A> &got, const std::vector<double> &want, double limit,
                 const std::string &what) {
  const double far = got.size() == want.size() ? distance(got, want) : INFINITY;
  char text[200];
  snprintf(text, sizeof(text), "%s: relative distance %.3g, limit %.3g", what.c_str(), far, limit);
  return check(far <= limit, text);
}

inline std::vector<double> widened(const std::vector<fb_bf16> &values) {
  std::vector<double> wide(values.size());
  for (size_t i = 0; i < values.size(); i++) {
    wide[i] = from_bf16(values[i]);
  }
  return wide;
}

// Whether these bytes are as they were allocated.
template <typename T> bool is_untouched(const T *from, size_t count) {
  const uint8_t *bytes = (const uint8_t *)from;
  for (size_t i = 0; i < count * sizeof(T); i++) {
    if (bytes[i] != 0xff) {
      return false;
    }
  }
  return true;
}

// `subset`: what sanitizers have the time for.
void test_norm_and_embedding(bool subset);
void test_gemm(bool subset);
void test_attention(bool subset);
void test_sampling(bool subset);
void test_copies(bool subset);
void test_planted(bool subset); // of the host run itself
