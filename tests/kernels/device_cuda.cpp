// A GPU through the CUDA driver, whose functions are declared here by hand and looked up when the
// program runs: building needs no toolkit, and the same program runs on any machine with a driver.
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

#include <map>

#include "device.h"

namespace {

typedef unsigned long long Pointer;
typedef struct Opaque *Handle;

// clang-format off
#define DRIVER(F) \
  F(cuInit, "cuInit", (unsigned)) \
  F(cuDriverGetVersion, "cuDriverGetVersion", (int *)) \
  F(cuDeviceGet, "cuDeviceGet", (int *, int)) \
  F(cuDeviceGetName, "cuDeviceGetName", (char *, int, int)) \
  F(cuDeviceGetAttribute, "cuDeviceGetAttribute", (int *, int, int)) \
  F(cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain", (Handle *, int)) \
  F(cuCtxSetCurrent, "cuCtxSetCurrent", (Handle)) \
  F(cuModuleLoadData, "cuModuleLoadData", (Handle *, const void *)) \
  F(cuModuleGetFunction, "cuModuleGetFunction", (Handle *, Handle, const char *)) \
  F(cuFuncSetAttribute, "cuFuncSetAttribute", (Handle, int, int)) \
  F(cuLaunchKernel, "cuLaunchKernel", (Handle, unsigned, unsigned, unsigned, unsigned, unsigned, \
    unsigned, unsigned, Handle, void **, void **)) \
  F(cuMemAlloc, "cuMemAlloc_v2", (Pointer *, size_t)) \
  F(cuMemFree, "cuMemFree_v2", (Pointer)) \
  F(cuMemGetInfo, "cuMemGetInfo_v2", (size_t *, size_t *)) \
  F(cuMemcpyHtoD, "cuMemcpyHtoD_v2", (Pointer, const void *, size_t)) \
  F(cuMemcpyDtoH, "cuMemcpyDtoH_v2", (void *, Pointer, size_t)) \
  F(cuMemcpyDtoDAsync, "cuMemcpyDtoDAsync_v2", (Pointer, Pointer, size_t, Handle)) \
  F(cuMemsetD8, "cuMemsetD8_v2", (Pointer, unsigned char, size_t)) \
  F(cuStreamCreate, "cuStreamCreate", (Handle *, unsigned)) \
  F(cuStreamSynchronize, "cuStreamSynchronize", (Handle)) \
  F(cuStreamBeginCapture, "cuStreamBeginCapture_v2", (Handle, int)) \
  F(cuStreamEndCapture, "cuStreamEndCapture", (Handle, Handle *)) \
  F(cuGraphInstantiate, "cuGraphInstantiateWithFlags", (Handle *, Handle, unsigned long long)) \
  F(cuGraphLaunch, "cuGraphLaunch", (Handle, Handle)) \
  F(cuGraphExecDestroy, "cuGraphExecDestroy", (Handle)) \
  F(cuGraphDestroy, "cuGraphDestroy", (Handle)) \
  F(cuEventCreate, "cuEventCreate", (Handle *, unsigned)) \
  F(cuEventRecord, "cuEventRecord", (Handle, Handle)) \
  F(cuEventSynchronize, "cuEventSynchronize", (Handle)) \
  F(cuEventElapsedTime, "cuEventElapsedTime", (float *, Handle, Handle)) \
  F(cuGetErrorName, "cuGetErrorName", (int, const char **))
// clang-format on

#define MEMBER(name, symbol, arguments) int(*name) arguments;
struct Driver {
  DRIVER(MEMBER)
};

constexpr int kMajor = 75, kMinor = 76, kMultiprocessors = 16; // CUdevice_attribute
constexpr int kMaxDynamicShared = 8;                           // CUfunction_attribute

class CudaDevice : public Device {
public:
  explicit CudaDevice(void *library) {
#define LOOK_UP(name, symbol, arguments) \
  driver_.name = (int(*) arguments)find(library, symbol);
    DRIVER(LOOK_UP)
  }
  // Whether there is a GPU, made ready.
  bool open(const std::vector<const char *> &files) {
    int index = 0;
    if (driver_.cuInit(0) != 0 || driver_.cuDeviceGet(&index, 0) != 0) {
      fprintf(stderr, "the CUDA driver finds no GPU\n");
      return false;
    }
    char name[256] = {};
    int major = 0, minor = 0, multiprocessors = 0, version = 0;
    check(driver_.cuDeviceGetName(name, sizeof(name), index), "name");
    check(driver_.cuDeviceGetAttribute(&major, kMajor, index), "attribute");
    check(driver_.cuDeviceGetAttribute(&minor, kMinor, index), "attribute");
    check(driver_.cuDeviceGetAttribute(&multiprocessors, kMultiprocessors, index), "attribute");
    check(driver_.cuDriverGetVersion(&version), "version");
    name_ = std::string(name) + ", sm_" + std::to_string(major) + std::to_string(minor) + ", " +
            std::to_string(multiprocessors) + " multiprocessors, CUDA driver API " +
            std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
    Handle context;
    check(driver_.cuDevicePrimaryCtxRetain(&context, index), "context");
    check(driver_.cuCtxSetCurrent(context), "context");
    for (const char *file : files) {
      Handle module;
      check(driver_.cuModuleLoadData(&module, read(file).data()), file);
      modules_.push_back(module);
    }
    check(driver_.cuStreamCreate(&stream_, 1), "stream"); // not after the default stream
    check(driver_.cuEventCreate(&start_, 0), "event");
    check(driver_.cuEventCreate(&end_, 0), "event");
    return true;
  }

  bool is_gpu() const override { return true; }
  std::string name() const override { return name_; }
  bool has(const char *kernel) override { return function(kernel) != nullptr; }
  void *allocate(size_t bytes) override {
    Pointer pointer = 0;
    check(driver_.cuMemAlloc(&pointer, bytes), "cuMemAlloc");
    check(driver_.cuMemsetD8(pointer, 0xff, bytes), "cuMemsetD8");
    return (void *)pointer;
  }
  void release(void *pointer) override {
    synchronise();
    check(driver_.cuMemFree((Pointer)pointer), "cuMemFree");
  }
  void upload(void *to, const void *from, size_t bytes) override {
    synchronise();
    check(driver_.cuMemcpyHtoD((Pointer)to, from, bytes), "upload");
  }
  void download(void *to, const void *from, size_t bytes) override {
    synchronise();
    check(driver_.cuMemcpyDtoH(to, (Pointer)from, bytes), "download");
  }
  void copy(void *to, const void *from, size_t bytes) override {
    check(driver_.cuMemcpyDtoDAsync((Pointer)to, (Pointer)from, bytes, stream_), "copy");
  }
  void launch(const char *kernel, Grid grid, uint32_t threads, size_t shared_bytes,
              const void *params, size_t) override {
    Handle of = function(kernel);
    if (of == nullptr) {
      fprintf(stderr, "no kernel %s\n", kernel);
      exit(1);
    }
    void *arguments[] = {(void *)params};
    size_t &allowed = shared_bytes_[kernel];
    if (shared_bytes > 48 << 10 && shared_bytes > allowed) {
      check(driver_.cuFuncSetAttribute(of, kMaxDynamicShared, (int)shared_bytes), kernel);
      allowed = shared_bytes;
    }
    check(driver_.cuLaunchKernel(of, grid.x, grid.y, grid.z, threads, 1, 1, (unsigned)shared_bytes,
                                 stream_, arguments, nullptr),
          kernel);
    if (is_careful) {
      check(driver_.cuStreamSynchronize(stream_), kernel);
    }
  }
  void synchronise() override { check(driver_.cuStreamSynchronize(stream_), "a kernel"); }
  bool fits(size_t bytes) override {
    size_t free = 0, total = 0;
    check(driver_.cuMemGetInfo(&free, &total), "memory");
    return bytes + (256 << 20) < free;
  }
  std::vector<double> time_runs(const std::function<void()> &work, int count) override {
    std::vector<double> seconds;
    for (int i = 0; i < count; i++) {
      synchronise();
      check(driver_.cuEventRecord(start_, stream_), "event");
      work();
      check(driver_.cuEventRecord(end_, stream_), "event");
      seconds.push_back(elapsed());
    }
    return seconds;
  }
  std::vector<double> time_replays(const std::function<void()> &work, int count) override {
    Handle graph, executable;
    check(driver_.cuStreamBeginCapture(stream_, 1), "capture");
    work();
    check(driver_.cuStreamEndCapture(stream_, &graph), "capture");
    check(driver_.cuGraphInstantiate(&executable, graph, 0), "graph");
    const auto replay = [&] { check(driver_.cuGraphLaunch(executable, stream_), "graph"); };
    replay(); // the first one loads it
    const std::vector<double> seconds = time_runs(replay, count);
    check(driver_.cuGraphExecDestroy(executable), "graph");
    check(driver_.cuGraphDestroy(graph), "graph");
    return seconds;
  }

private:
  static void *find(void *library, const char *symbol) {
    void *found = dlsym(library, symbol);
    if (found == nullptr) {
      fprintf(stderr, "the CUDA driver has no %s\n", symbol);
      exit(1);
    }
    return found;
  }
  static std::string read(const char *path) {
    FILE *file = fopen(path, "rb");
    if (file == nullptr) {
      perror(path);
      exit(1);
    }
    std::string text;
    char part[65536];
    for (size_t count; (count = fread(part, 1, sizeof(part), file)) > 0;) {
      text.append(part, count);
    }
    fclose(file);
    return text;
  }
  void check(int error, const char *what) {
    if (error != 0) {
      const char *name = nullptr;
      driver_.cuGetErrorName(error, &name);
      fprintf(stderr, "%s: %s\n", what, name != nullptr ? name : "unknown error");
      exit(1);
    }
  }
  Handle function(const char *kernel) {
    const auto found = functions_.find(kernel);
    if (found != functions_.end()) {
      return found->second;
    }
    Handle of = nullptr;
    for (const Handle module : modules_) {
      if (of == nullptr && driver_.cuModuleGetFunction(&of, module, kernel) != 0) {
        of = nullptr;
      }
    }
    return functions_[kernel] = of;
  }
  double elapsed() {
    float milliseconds = 0;
    check(driver_.cuEventSynchronize(end_), "the work timed");
    check(driver_.cuEventElapsedTime(&milliseconds, start_, end_), "event");
    return milliseconds * 1e-3;
  }

  Driver driver_;
  std::string name_;
  std::vector<Handle> modules_;
  Handle stream_ = nullptr, start_ = nullptr, end_ = nullptr;
  std::map<std::string, Handle> functions_;
  std::map<std::string, size_t> shared_bytes_;
};

} // namespace

std::unique_ptr<Device> make_cuda_device(const std::vector<const char *> &files) {
  void *library = dlopen("libcuda.so.1", RTLD_NOW);
  if (library == nullptr) {
    fprintf(stderr, "no CUDA driver: %s\n", dlerror());
    return nullptr;
  }
  auto device = std::make_unique<CudaDevice>(library);
  if (!device->open(files)) {
    return nullptr;
  }
  return device;
}
