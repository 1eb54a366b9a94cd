// The host run as a device.
#include "device.h"
#include "host/run.h"

namespace {

class HostDevice : public Device {
public:
  bool is_gpu() const override { return false; }
  std::string name() const override { return "host run"; }
  bool has(const char *kernel) override { return fb_host_has(kernel); }
  void *allocate(size_t bytes) override { return fb_host_allocate(bytes); }
  void release(void *pointer) override { fb_host_release(pointer); }
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

std::unique_ptr<Device> make_host_device() {
  fb_host_report_faults();
  return std::make_unique<HostDevice>();
}
