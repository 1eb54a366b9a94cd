// The host run as a device. Arrays are separate allocations, for AddressSanitizer's sake.
#include <stdio.h>
#include <stdlib.h>

#include "device.h"
#include "host/run.h"

namespace {

class HostDevice : public Device {
public:
  bool is_gpu() const override { return false; }
  std::string name() const override { return "host run"; }
  bool has(const char *kernel) override { return fb_host_has(kernel); }
  void *allocate(size_t bytes) override {
    void *memory = nullptr;
    if (posix_memalign(&memory, 256, bytes) != 0) {
      abort();
    }
    memset(memory, 0xff, bytes);
    return memory;
  }
  void release(void *pointer) override { free(pointer); }
  void upload(void *to, const void *from, size_t bytes) override { memcpy(to, from, bytes); }
  void download(void *to, const void *from, size_t bytes) override { memcpy(to, from, bytes); }
  void copy(void *to, const void *from, size_t bytes) override { memcpy(to, from, bytes); }
  void launch(const char *kernel, Grid grid, uint32_t threads, size_t shared_bytes,
              const void *params, size_t params_bytes) override {
    const uint32_t blocks[3] = {grid.x, grid.y, grid.z}, block[3] = {threads, 1, 1};
    fb_host_launch(kernel, blocks, block, shared_bytes, params, params_bytes);
  }
  void synchronise() override {}
};

} // namespace

std::unique_ptr<Device> make_host_device() { return std::make_unique<HostDevice>(); }
