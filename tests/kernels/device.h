// What tests and timings need of a device. Two stand behind it: the host run, and a GPU through the
// CUDA driver, which is loaded when it is needed, so that the program builds without either.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

struct Grid {
  uint32_t x = 1, y = 1, z = 1;
};

class Device {
public:
  virtual ~Device() {}
  virtual bool is_gpu() const = 0;
  virtual std::string name() const = 0;
  virtual bool has(const char *kernel) = 0;
  // Filled with 0xff: no number, as f32 and as bf16.
  virtual void *allocate(size_t bytes) = 0;
  virtual void release(void *pointer) = 0;
  virtual void upload(void *to, const void *from, size_t bytes) = 0;
  virtual void download(void *to, const void *from, size_t bytes) = 0;
  virtual void copy(void *to, const void *from, size_t bytes) = 0;
  virtual void launch(const char *kernel, Grid grid, uint32_t threads, size_t shared_bytes,
                      const void *params, size_t params_bytes) = 0;
  virtual void synchronise() = 0;
  // Whether as many bytes are free.
  virtual bool fits(size_t) { return true; }
  // Seconds of each of `count` runs of work, or of replays of the graph that it makes; a GPU only.
  virtual std::vector<double> time_runs(const std::function<void()> &, int) { return {}; }
  virtual std::vector<double> time_replays(const std::function<void()> &, int) { return {}; }
  // Whether each launch is waited for, so that a fault is found where it is made.
  bool is_careful = true;

  template <typename P>
  void run(const std::string &kernel, Grid grid, uint32_t threads, size_t shared_bytes,
           const P &params) {
    launch(kernel.c_str(), grid, threads, shared_bytes, &params, sizeof(P));
  }
};

std::unique_ptr<Device> make_host_device();
// With kernels of these files (fatbin or cubin); null, having said why, without a GPU.
std::unique_ptr<Device> make_cuda_device(const std::vector<const char *> &files);

extern Device *device;

// An array on the device, exactly as long as it is named: what lies beyond is not ours.
template <typename T> class Array {
public:
  explicit Array(size_t count = 0) : count_(count) { take(); }
  explicit Array(const std::vector<T> &values) : count_(values.size()) {
    take();
    if (count_ > 0) {
      device->upload(at_, values.data(), count_ * sizeof(T));
    }
  }
  Array(Array &&other) : at_(other.at_), count_(other.count_) {
    other.at_ = nullptr;
    other.count_ = 0;
  }
  Array &operator=(Array &&other) {
    std::swap(at_, other.at_);
    std::swap(count_, other.count_);
    return *this;
  }
  ~Array() {
    if (at_ != nullptr) {
      device->release(at_);
    }
  }
  T *at() const { return at_; }
  size_t count() const { return count_; }
  std::vector<T> values() const {
    std::vector<T> values(count_);
    if (count_ > 0) {
      device->download(values.data(), at_, count_ * sizeof(T));
    }
    return values;
  }
  void set(const std::vector<T> &values) { device->upload(at_, values.data(), values.size() * sizeof(T)); }

private:
  void take() { at_ = count_ > 0 ? (T *)device->allocate(count_ * sizeof(T)) : nullptr; }
  T *at_ = nullptr;
  size_t count_ = 0;
};
