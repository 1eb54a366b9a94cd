// Products against f64 on the same packed weights, and batch invariance bit for bit.
#include <algorithm>
#include <thread>

#include "gemm.h"
#include "reference.h"

namespace {

struct Shape {
  const char *name;
  Epilogue epilogue;
  uint32_t rows, columns;
  uint32_t heads, kv_heads, head_dim, rope_dims; // qkv
};

constexpr uint32_t kTokens = 100, kBlocks = 5, kContext = 300;

// One weight, the activations of kTokens tokens, and what comes out in f64.
class Case {
public:
  Case(const Shape &shape, uint32_t type)
      : shape_(shape), random_(shape.rows * 3 + shape.columns + type),
        packed_(random_weight(random_, type, shape.rows, shape.columns, order(shape.epilogue))),
        weight_(packed_), x_(random_bf16(random_, (size_t)kTokens * shape.columns)),
        before_(random_f32(random_, (size_t)kTokens * shape.rows)),
        rope_(rope_table(shape.rope_dims)), rope_at_(rope_) {
    name_ = std::string("gemm ") + type_names[type] + " " + epilogue_names[shape.epilogue] + " " +
            shape.name;
    for (uint32_t token = 0; token < kTokens; token++) {
      positions_.push_back((token * 37 + 11) % kContext);
    }
    refer();
  }

  // What a run gives for its tokens, in order: f32 values, or bf16 values widened.
  struct Output {
    uint32_t width = 0;
    std::vector<float> values; // [tokens][width]
  };

  // Runs tokens `chosen` in this order as one step, through the kernel for tiles of n.
  Output run(uint32_t n, const std::vector<uint32_t> &chosen, Parts parts) {
    const uint32_t count = (uint32_t)chosen.size(), padded = (count + n - 1) / n * n + n;
    std::vector<fb_bf16> x;
    std::vector<uint32_t> positions, places;
    std::vector<float> y32((size_t)padded * shape_.rows, float_of(0xffffffffu));
    for (uint32_t i = 0; i < count; i++) {
      const uint32_t token = chosen[i];
      const auto from = x_.begin() + (size_t)token * shape_.columns;
      x.insert(x.end(), from, from + shape_.columns);
      positions.push_back(positions_[token]);
      // Every place is different; some tokens are written nowhere.
      places.push_back(is_hidden(token) ? FB_NONE : (i * 3 + 1) % (kBlocks * 64));
      if (shape_.epilogue == RESIDUAL) {
        std::copy_n(&before_[(size_t)token * shape_.rows], shape_.rows,
                    &y32[(size_t)i * shape_.rows]);
      }
    }
    Array<fb_bf16> x_at(x), y16((size_t)padded * y16_width()), kv(kv_elements());
    Array<uint32_t> positions_at(positions), places_at(places);
    Array<uint32_t> count_at(std::vector<uint32_t>{count});
    Array<float> y32_at(y32);
    fb_gemm p = {};
    p.weight = weight_.weight;
    p.x = x_at.at();
    p.count = count_at.at();
    p.y32 = y32_at.at();
    p.y16 = y16.at();
    p.rope = rope_at_.at();
    p.positions = positions_at.at();
    p.kv_places = places_at.at();
    p.kv = kv.at();
    p.heads = shape_.heads;
    p.kv_heads = shape_.kv_heads;
    p.head_dim = shape_.head_dim;
    p.rope_dims = shape_.rope_dims;
    launch_gemm(p, shape_.epilogue, n, padded, parts); // a tile of tokens too many
    return collect(y32_at.values(), y16.values(), kv.values(), places, count);
  }

  // Distance to f64 within limits, nothing written elsewhere, bits as in `alone` if there.
  void check_run(uint32_t n, const std::vector<uint32_t> &chosen, Parts parts = SPREAD) {
    const std::string what = name_ + " n=" + std::to_string(n) + " T=" +
                             std::to_string(chosen.size()) +
                             (parts == IN_TURN ? " in turn" : "");
    const Output output = run(n, chosen, parts);
    std::vector<double> want;
    for (const uint32_t token : chosen) {
      const auto from = want_.begin() + (size_t)token * output.width;
      want.insert(want.end(), from, from + output.width);
    }
    const bool is_f32 = shape_.epilogue == STORE || shape_.epilogue == RESIDUAL;
    check_close(output.values, want, is_f32 ? 1e-5 : 3e-3, what);
    for (size_t i = 0; i < chosen.size(); i++) {
      std::vector<float> &known = alone_[chosen[i]];
      const float *its = &output.values[i * output.width];
      if (known.empty()) {
        known.assign(its, its + output.width);
      }
      check(memcmp(known.data(), its, output.width * 4) == 0,
            what + ": token " + std::to_string(chosen[i]) + " depends on its batch");
    }
  }

private:
  static RowOrder order(Epilogue epilogue) {
    return epilogue == QKV ? ROPE_PAIRS : epilogue == SWIGLU ? GATE_UP : PLAIN;
  }
  static std::vector<float> rope_table(uint32_t dims) {
    std::vector<float> table;
    for (uint32_t position = 0; position < kContext && dims > 0; position++) {
      for (uint32_t i = 0; i < dims / 2; i++) {
        const double angle = position * pow(10000, -2.0 * i / dims);
        table.push_back((float)cos(angle));
        table.push_back((float)sin(angle));
      }
    }
    return table;
  }
  static bool is_hidden(uint32_t token) { return token % 5 == 2; }
  uint32_t y16_width() const {
    return shape_.epilogue == SWIGLU ? shape_.rows / 2
           : shape_.epilogue == QKV  ? shape_.heads * shape_.head_dim
                                     : 0;
  }
  size_t kv_elements() const {
    return (size_t)kBlocks * shape_.kv_heads * 2 * 64 * shape_.head_dim;
  }

  static double product(const double *a, const double *b, uint32_t count) {
    double sums[4] = {}; // not one chain of additions
    for (uint32_t k = 0; k < count; k += 4) {
      for (uint32_t i = 0; i < 4; i++) {
        sums[i] += a[k + i] * b[k + i];
      }
    }
    return sums[0] + sums[1] + sums[2] + sums[3];
  }

  void refer() {
    const std::vector<double> x = widened(x_);
    std::vector<double> c((size_t)kTokens * shape_.rows);
    // A thread every so many rows; the large shapes would take minutes otherwise.
    const uint32_t threads = std::max(1u, std::min(16u, std::thread::hardware_concurrency()));
    std::vector<std::thread> workers;
    for (uint32_t worker = 0; worker < threads; worker++) {
      workers.emplace_back([&, worker] {
        for (uint32_t row = worker; row < shape_.rows; row += threads) {
          for (uint32_t token = 0; token < kTokens; token++) {
            c[(size_t)token * shape_.rows + row] =
                product(&packed_.values[(size_t)row * shape_.columns],
                        &x[(size_t)token * shape_.columns], shape_.columns);
          }
        }
      });
    }
    for (std::thread &worker : workers) {
      worker.join();
    }
    for (uint32_t token = 0; token < kTokens; token++) {
      refer_token(token, &c[(size_t)token * shape_.rows]);
    }
  }

  void refer_token(uint32_t token, const double *c) {
    const uint32_t rows = shape_.rows;
    for (uint32_t row = 0; row < rows; row++) {
      if (shape_.epilogue == STORE) {
        want_.push_back(c[row]);
      } else if (shape_.epilogue == RESIDUAL) {
        want_.push_back(before_[(size_t)token * rows + row] + c[row]);
      } else if (shape_.epilogue == SWIGLU && row < rows / 2) {
        want_.push_back(c[row] / (1 + exp(-c[row])) * c[rows / 2 + row]);
      } else if (shape_.epilogue == QKV) {
        const uint32_t head = row / shape_.head_dim, within = row % shape_.head_dim;
        double value = c[row];
        if (head < shape_.heads + shape_.kv_heads && within < shape_.rope_dims) {
          const size_t at = (size_t)positions_[token] * shape_.rope_dims + within / 2 * 2;
          const double cosine = rope_[at], sine = rope_[at + 1];
          value = within % 2 == 0 ? c[row] * cosine - c[row + 1] * sine
                                  : c[row - 1] * sine + c[row] * cosine;
        }
        const bool is_kv = head >= shape_.heads;
        want_.push_back(is_kv && is_hidden(token) ? 0 : value);
      }
    }
  }

  Output collect(const std::vector<float> &y32, const std::vector<fb_bf16> &y16,
                 std::vector<fb_bf16> kv, const std::vector<uint32_t> &places, uint32_t count) {
    Output output;
    const bool is_f32 = shape_.epilogue == STORE || shape_.epilogue == RESIDUAL;
    const uint32_t width = is_f32 ? shape_.rows : y16_width();
    if (is_f32) {
      output.values.assign(y32.begin(), y32.begin() + (size_t)count * width);
      check(is_untouched(&y32[(size_t)count * width], y32.size() - (size_t)count * width),
            name_ + ": wrote beyond its tokens");
    } else {
      check(is_untouched(&y16[(size_t)count * width], y16.size() - (size_t)count * width),
            name_ + ": wrote beyond its tokens");
    }
    output.width = is_f32 ? width : shape_.epilogue == QKV ? shape_.rows : width;
    for (uint32_t i = 0; i < count && !is_f32; i++) {
      for (uint32_t j = 0; j < width; j++) {
        output.values.push_back((float)from_bf16(y16[(size_t)i * width + j]));
      }
      if (shape_.epilogue == QKV) {
        take_kv(output, kv, places[i]);
      }
    }
    check(is_untouched(kv.data(), kv.size()), name_ + ": wrote beyond its place in the cache");
    return output;
  }

  // A token's keys, then values, out of the cache, which is poisoned again there.
  void take_kv(Output &output, std::vector<fb_bf16> &kv, uint32_t place) {
    const uint32_t dim = shape_.head_dim;
    for (uint32_t is_value = 0; is_value < 2; is_value++) {
      for (uint32_t head = 0; head < shape_.kv_heads; head++) {
        const size_t plane = ((size_t)(place / 64) * shape_.kv_heads + head) * 2 + is_value;
        for (uint32_t i = 0; i < dim; i++) {
          if (place == FB_NONE) {
            output.values.push_back(0);
            continue;
          }
          fb_bf16 &value = kv[(plane * 64 + place % 64) * dim + i];
          output.values.push_back((float)from_bf16(value));
          value = 0xffff;
        }
      }
    }
  }

  Shape shape_;
  Random random_;
  Packed packed_;
  DeviceWeight weight_;
  std::vector<fb_bf16> x_;
  std::vector<float> before_;
  std::vector<float> rope_;
  Array<float> rope_at_;
  std::vector<uint32_t> positions_;
  std::vector<double> want_;
  std::string name_;
  std::vector<float> alone_[kTokens];
};

std::vector<uint32_t> tokens(uint32_t first, uint32_t count, uint32_t stride = 1) {
  std::vector<uint32_t> chosen;
  for (uint32_t i = 0; i < count; i++) {
    chosen.push_back((first + i * stride) % kTokens);
  }
  return chosen;
}

void gemm_case(const Shape &shape, uint32_t type, bool subset) {
  const std::string kernel = gemm_kernel(type, shape.epilogue, 8);
  if (!check(device->has(kernel.c_str()), "there is a kernel " + kernel)) {
    return;
  }
  Case it(shape, type);
  // Alone first: what any company must not change.
  it.check_run(8, tokens(5, 1));
  it.check_run(8, tokens(69, 1));
  it.check_run(16, tokens(0, 13));
  it.check_run(8, tokens(3, 9, 3));
  it.check_run(64, tokens(5, 2), IN_TURN);
  if (subset) {
    return;
  }
  it.check_run(32, tokens(69, 29, 69)); // backwards
  it.check_run(64, tokens(0, kTokens));
  it.check_run(64, tokens(1, 69), IN_TURN);
}

// One token alone in tiles of every size, and in every place of them.
void places_case(const Shape &shape, uint32_t type) {
  Case it(shape, type);
  for (const uint32_t n : {8u, 16u, 32u, 64u}) {
    it.check_run(n, {5});
    it.check_run(n, std::vector<uint32_t>(n, 5));
  }
  it.check_run(64, std::vector<uint32_t>(64, 5), IN_TURN);
}

} // namespace

void test_gemm(bool subset) {
  const Shape shapes[] = {
      {"SmolLM2 qkv", QKV, 960, 576, 9, 3, 64, 64},
      {"head_dim 96, half of it turned", QKV, 576, 64, 2, 2, 96, 48},
      {"SmolLM2 o", RESIDUAL, 576, 576, 0, 0, 0, 0},
      {"SmolLM2 gate|up", SWIGLU, 3072, 576, 0, 0, 0, 0},
      {"SmolLM2 down", RESIDUAL, 576, 1536, 0, 0, 0, 0},
      {"a head of 1000 rows", STORE, 1000, 576, 0, 0, 0, 0},
      {"one tile", STORE, 16, 32, 0, 0, 0, 0},
      {"Llama-like qkv", QKV, 768, 1024, 4, 1, 128, 128},
      {"Llama-like down", RESIDUAL, 64, 14336, 0, 0, 0, 0},
      {"Llama-like gate|up", SWIGLU, 256, 4096, 0, 0, 0, 0},
      {"Llama-like head", STORE, 136, 4096, 0, 0, 0, 0},
  };
  const Shape large[] = {
      {"Llama-3-8B qkv", QKV, 6144, 4096, 32, 8, 128, 128},
      {"Llama-3-8B down", RESIDUAL, 4096, 14336, 0, 0, 0, 0},
      {"SmolLM2 head", STORE, 49152, 576, 0, 0, 0, 0},
  };
  for (uint32_t type = 0; type < 4; type++) {
    for (const Shape &shape : shapes) {
      if (!subset && (shape.rows == 576 || shape.rows == 16)) {
        places_case(shape, type);
      }
      const bool is_small = (uint64_t)shape.rows * shape.columns < 600000;
      if (!subset || is_small) {
        gemm_case(shape, type, subset);
      }
    }
    for (const Shape &shape : large) {
      if (device->is_gpu() && !subset && type % 3 == 0) {
        gemm_case(shape, type, false);
      }
    }
  }
}
