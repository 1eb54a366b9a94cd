// Tests of the kernels: against f64, bit for bit where they promise it, and, on a GPU, timings.
#include <stdio.h>
#include <stdlib.h>

#include <chrono>

#include "reference.h"
#ifdef FOREBAY_HOST
#include "host/run.h"
#else
#include "bench.h"
#endif

Device *device;
Results results;

namespace {

struct Group {
  const char *name;
  void (*run)(bool subset);
};

const Group groups[] = {
#ifdef FOREBAY_HOST
    {"planted", test_planted},
#endif
    {"norm", test_norm_and_embedding},
    {"gemm", test_gemm},
    {"attention", test_attention},
    {"sampling", test_sampling},
    {"copies", test_copies},
};

int test(bool subset, const char *only) {
  for (const Group &group : groups) {
    if (only != nullptr && strcmp(only, group.name) != 0) {
      continue;
    }
    const Results before = results;
    const auto start = std::chrono::steady_clock::now();
    group.run(subset);
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    printf("%-10s %5d checks, %d failed, %.1f s\n", group.name, results.checks - before.checks,
           results.failures - before.failures, took.count());
    fflush(stdout);
  }
  printf("%s: %d checks, %d failed\n", device->name().c_str(), results.checks, results.failures);
  return results.failures > 0 ? 1 : 0;
}

int usage() {
  fprintf(stderr, "usage: kernel-tests [--subset] [--seed N] [--only GROUP] [--bench JSON] [FATBIN]...\n");
  return 2;
}

} // namespace

int main(int argc, char **argv) {
  std::vector<const char *> files;
  const char *only = nullptr, *json = nullptr;
  bool subset = false;
  uint32_t seed = 1;
  for (int i = 1; i < argc; i++) {
    const std::string option = argv[i];
    if (option == "--subset") {
      subset = true;
    } else if (option[0] != '-') {
      files.push_back(argv[i]);
    } else if (i + 1 >= argc) {
      return usage();
    } else if (option == "--only") {
      only = argv[++i];
    } else if (option == "--bench") {
      json = argv[++i];
    } else if (option == "--seed") {
      seed = (uint32_t)atoi(argv[++i]);
    } else {
      return usage();
    }
  }
#ifdef FOREBAY_HOST
  if (!files.empty() || json != nullptr) {
    return usage();
  }
  fb_host_seed(seed);
  const std::unique_ptr<Device> owner = make_host_device();
#else
  (void)seed;
  if (files.empty()) {
    return usage();
  }
  const std::unique_ptr<Device> owner = make_cuda_device(files);
  if (owner == nullptr) {
    return 3; // no GPU
  }
#endif
  device = owner.get();
  printf("%s\n", device->name().c_str());
#ifndef FOREBAY_HOST
  if (json != nullptr) {
    return bench(json);
  }
#endif
  return test(subset, only);
}
