// The host run: blocks of fibers. See host.h; hooks of primitives.cuh are at the end.
#include "host.h"

#include <dlfcn.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <random>
#include <vector>

#include "planted.h"
#include "run.h"
#include "../../../kernels/abi.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

// Saves the callee's registers on the stack, keeps it in *from and goes on with `to`.
extern "C" void fb_host_switch(void **from, void *to);
asm(R"(
.text
.globl fb_host_switch
.type fb_host_switch, @function
fb_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fb_host_switch, .-fb_host_switch
)");

// Both are null where no kernel has static shared memory.
extern "C" __attribute__((weak)) char __start_fb_shared[], __stop_fb_shared[];

namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr int kNaN = 0xff; // four of these are no number, as two are in bf16

enum State { kReady, kAtBarrier, kAtWarp, kDone };
enum WarpKind { kShuffle, kBallot, kSyncWarp, kMma, kLdmatrix };

struct Copy {
  void *to;
  const void *from;
  int bytes, source_bytes, group;
};

// What a lane brings to something that its warp does together, and what it gets.
struct Lane {
  WarpKind kind;
  int detail;
  uint32_t mask;
  uint64_t value, result;
  uint32_t by;
  uint32_t a[4], b[2], r[4];
  float c[4], d[4];
  const void *row;
};

struct Fiber {
  void *stack_pointer;
  char *stack;
  State state;
  int barrier; // line of the barrier where it waits
  dim3 index;
  Lane lane;
  std::vector<Copy> copies;
  int groups; // committed
};

std::vector<Fiber> fibers;
std::vector<uint32_t> order;
char *dynamic_shared;
size_t dynamic_shared_bytes;
std::mt19937 generator(1);
void *scheduler;
uint32_t running, threads, at_barrier, done;
bool is_running;
const char *kernel_name;
void (*call)(const void *params, void *function);
const void *call_params;
void *call_function;

[[noreturn]] void fail(const char *what) {
  fprintf(stderr, "%s, block (%u %u %u), thread %u: %s\n", kernel_name, blockIdx.x, blockIdx.y,
          blockIdx.z, running, what);
  uint32_t counts[4] = {};
  for (uint32_t i = 0; i < threads && i < fibers.size(); i++) {
    counts[fibers[i].state]++;
  }
  fprintf(stderr, "threads: %u ready, %u at a barrier, %u in a warp's operation, %u ended\n",
          counts[kReady], counts[kAtBarrier], counts[kAtWarp], counts[kDone]);
  abort();
}

Fiber &self() { return fibers[running]; }

void pause(State state) {
  self().state = state;
  fb_host_switch(&self().stack_pointer, scheduler);
}

void fiber_main() {
  call(call_params, call_function);
  done++;
  pause(kDone);
  abort();
}

void start(uint32_t index) {
  Fiber &fiber = fibers[index];
  if (fiber.stack == nullptr) {
    void *memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
      fail("no memory for a stack");
    }
    mprotect(memory, 4096, PROT_NONE); // an overflow must not go unseen
    fiber.stack = (char *)memory;
  }
  void **top = (void **)(fiber.stack + kStackBytes);
  *--top = nullptr; // the return address, after which the stack is aligned as after a call
  *--top = (void *)fiber_main;
  top -= 6;
  memset(top, 0, 48);
  fiber.stack_pointer = top;
  fiber.state = kReady;
  fiber.copies.clear();
  fiber.groups = 0;
  fiber.index = {index % blockDim.x, index / blockDim.x % blockDim.y,
                 index / blockDim.x / blockDim.y};
}

void run_block() {
  if (dynamic_shared_bytes > 0) {
    memset(dynamic_shared, kNaN, dynamic_shared_bytes);
  }
  if (__start_fb_shared != nullptr) {
    memset(__start_fb_shared, kNaN, __stop_fb_shared - __start_fb_shared);
  }
  at_barrier = done = 0;
  for (uint32_t i = 0; i < threads; i++) {
    start(i);
  }
  std::shuffle(order.begin(), order.end(), generator);
  while (done < threads) {
    bool moved = false;
    for (const uint32_t index : order) {
      if (fibers[index].state == kReady) {
        moved = true;
        running = index;
        threadIdx = fibers[index].index;
        is_running = true;
        fb_host_switch(&scheduler, fibers[index].stack_pointer);
        is_running = false;
      }
    }
    if (!moved && at_barrier == threads) {
      at_barrier = 0;
      for (uint32_t i = 0; i < threads; i++) {
        if (fibers[i].barrier != fibers[0].barrier) {
          fail("threads meet at different barriers");
        }
        fibers[i].state = kReady;
      }
      std::shuffle(order.begin(), order.end(), generator);
    } else if (!moved && done < threads) {
      fail("threads wait for others that never come");
    }
  }
}

// Lanes that wait for the same thing.
uint32_t arrived(uint32_t first, const Lane &own) {
  uint32_t mask = 0;
  for (uint32_t lane = 0; lane < 32 && first + lane < threads; lane++) {
    const Fiber &other = fibers[first + lane];
    const bool same = other.lane.kind == own.kind && other.lane.mask == own.mask &&
                      other.lane.detail == own.detail;
    if (first + lane == running || (other.state == kAtWarp && same)) {
      mask |= 1u << lane;
    }
  }
  return mask;
}

float from_bf16(uint32_t bits) { return __uint_as_float(bits << 16); }

void shuffle(Fiber *warp, uint32_t mask) {
  for (uint32_t lane = 0; lane < 32; lane++) {
    if (!(mask >> lane & 1)) {
      continue;
    }
    Lane &own = warp[lane].lane;
    uint32_t from = lane;
    switch (own.detail) {
    case FB_SHUFFLE_XOR: from = lane ^ own.by; break;
    case FB_SHUFFLE_INDEX: from = own.by % 32; break;
    case FB_SHUFFLE_UP: from = lane >= own.by ? lane - own.by : lane; break;
    default: from = lane + own.by < 32 ? lane + own.by : lane;
    }
    if (from >= 32 || !(mask >> from & 1)) {
      fail("a shuffle reads a lane that takes no part");
    }
    own.result = warp[from].lane.value;
  }
}

// Exact products, summed in double precision and rounded once.
void mma(Fiber *warp) {
  float a[16][16], b[16][8];
  double d[16][8];
  for (uint32_t lane = 0; lane < 32; lane++) {
    const Lane &own = warp[lane].lane;
    const uint32_t g = lane / 4, t = lane % 4;
    for (uint32_t i = 0; i < 4; i++) {
      const uint32_t row = g + i % 2 * 8, column = 2 * t + i / 2 * 8;
      a[row][column] = from_bf16(own.a[i] & 0xffff);
      a[row][column + 1] = from_bf16(own.a[i] >> 16);
      d[g + i / 2 * 8][2 * t + i % 2] = own.c[i];
    }
    for (uint32_t i = 0; i < 2; i++) {
      b[2 * t + 8 * i][g] = from_bf16(own.b[i] & 0xffff);
      b[2 * t + 8 * i + 1][g] = from_bf16(own.b[i] >> 16);
    }
  }
  for (uint32_t row = 0; row < 16; row++) {
    for (uint32_t k = 0; k < 16; k++) {
      for (uint32_t column = 0; column < 8; column++) {
        d[row][column] += (double)a[row][k] * b[k][column];
      }
    }
  }
  for (uint32_t lane = 0; lane < 32; lane++) {
    for (uint32_t i = 0; i < 4; i++) {
      warp[lane].lane.d[i] = (float)d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
    }
  }
}

void ldmatrix(Fiber *warp) {
  const int count = warp[0].lane.detail / 2;
  const bool transposed = warp[0].lane.detail % 2;
  for (int matrix = 0; matrix < count; matrix++) {
    uint16_t values[8][8];
    for (int row = 0; row < 8; row++) {
      const void *from = warp[matrix * 8 + row].lane.row;
      if ((uintptr_t)from % 16 != 0) {
        fail("ldmatrix of a row that is not 16-byte aligned");
      }
      memcpy(values[row], from, 16);
    }
    for (int lane = 0; lane < 32; lane++) {
      const int g = lane / 4, t = lane % 4 * 2;
      const uint32_t low = transposed ? values[t][g] : values[g][t];
      const uint32_t high = transposed ? values[t + 1][g] : values[g][t + 1];
      warp[lane].lane.r[matrix] = low | high << 16;
    }
  }
}

// Waits for the lanes of the mask; the last to come does the work of all.
void meet(WarpKind kind, int detail, uint32_t mask) {
  Lane &own = self().lane;
  const uint32_t first = running / 32 * 32;
  own.kind = kind;
  own.detail = detail;
  own.mask = mask;
  if (!(mask >> running % 32 & 1)) {
    fail("a lane is not in its own mask");
  }
  if ((arrived(first, own) & mask) != mask) {
    pause(kAtWarp);
    return;
  }
  Fiber *warp = &fibers[first];
  uint32_t ballot = 0;
  switch (kind) {
  case kShuffle: shuffle(warp, mask); break;
  case kMma: mma(warp); break;
  case kLdmatrix: ldmatrix(warp); break;
  case kSyncWarp: break;
  case kBallot:
    for (uint32_t lane = 0; lane < 32; lane++) {
      ballot |= (mask >> lane & 1) && warp[lane].lane.value ? 1u << lane : 0;
    }
  }
  for (uint32_t lane = 0; lane < 32; lane++) {
    if (mask >> lane & 1) {
      warp[lane].state = kReady;
      if (kind == kBallot) {
        warp[lane].lane.result = ballot;
      }
    }
  }
}

template <typename P> void call_with(const void *params, void *function) {
  ((void (*)(P))function)(*(const P *)params);
}

struct Family {
  const char *prefix;
  size_t bytes;
  void (*call)(const void *, void *);
};

template <typename P> Family family(const char *prefix) {
  return {prefix, sizeof(P), call_with<P>};
}

const Family families[] = {
    family<fb_embed>("forebay_embed"),         family<fb_rmsnorm>("forebay_rmsnorm"),
    family<fb_gemm>("forebay_gemm"),           family<fb_attention>("forebay_attention"),
    family<fb_sample>("forebay_sample"),       family<fb_count>("forebay_count"),
    family<fb_kv_copy>("forebay_kv_copy"),     family<fb_planted>("forebay_planted"),
};

void take_dynamic_shared(size_t bytes) {
  if (dynamic_shared != nullptr && bytes != dynamic_shared_bytes) {
    fb_host_release(dynamic_shared);
    dynamic_shared = nullptr;
  }
  if (dynamic_shared == nullptr && bytes > 0) {
    dynamic_shared = (char *)fb_host_allocate(bytes);
  }
  dynamic_shared_bytes = bytes;
}

// In no order that a kernel could rely on.
std::vector<dim3> blocks_of(const uint32_t grid[3]) {
  std::vector<dim3> blocks;
  for (uint32_t z = 0; z < grid[2]; z++) {
    for (uint32_t y = 0; y < grid[1]; y++) {
      for (uint32_t x = 0; x < grid[0]; x++) {
        blocks.push_back({x, y, z});
      }
    }
  }
  std::shuffle(blocks.begin(), blocks.end(), generator);
  return blocks;
}

#ifndef __SANITIZE_ADDRESS__
constexpr size_t kPageBytes = 4096;

struct Mapping {
  char *start; // the array ends where its last page does, but for what keeps it aligned
  size_t bytes, array_bytes;
};
std::map<void *, Mapping> mappings;

void on_fault(int signal) {
  if (is_running) {
    fail("touched memory that is nobody's");
  }
  ::signal(signal, SIG_DFL); // and once more
}
#endif

} // namespace

bool fb_host_has(const char *name) { return dlsym(RTLD_DEFAULT, name) != nullptr; }

void fb_host_seed(uint32_t seed) { generator.seed(seed); }

void fb_host_launch(const char *name, const uint32_t grid[3], const uint32_t block[3],
                    size_t shared_bytes, const void *params, size_t params_bytes) {
  kernel_name = name;
  gridDim = {grid[0], grid[1], grid[2]};
  blockDim = {block[0], block[1], block[2]};
  threads = block[0] * block[1] * block[2];
  call = nullptr;
  for (const Family &family : families) {
    if (strncmp(name, family.prefix, strlen(family.prefix)) == 0) {
      call = family.bytes == params_bytes ? family.call : nullptr;
    }
  }
  call_params = params;
  call_function = dlsym(RTLD_DEFAULT, name);
  if (call == nullptr || call_function == nullptr || threads == 0 || threads > 1024) {
    fail("no such kernel, or not with such parameters");
  }
  if (fibers.size() < threads) {
    fibers.resize(threads);
  }
  order.resize(threads);
  for (uint32_t i = 0; i < threads; i++) {
    order[i] = i;
  }
  take_dynamic_shared(shared_bytes);
  for (const dim3 &block : blocks_of(grid)) {
    blockIdx = block;
    run_block();
  }
}

#ifdef __SANITIZE_ADDRESS__
// The sanitizer sees every access beyond what was asked for.
void *fb_host_allocate(size_t bytes) {
  void *memory = nullptr;
  if (posix_memalign(&memory, 16, bytes) != 0) {
    abort();
  }
  return memset(memory, kNaN, bytes);
}
void fb_host_release(void *memory) { free(memory); }
void fb_host_report_faults() {}
#else
// With a page behind it that cannot be touched. No more than 16-byte aligned, as abi.h says.
void *fb_host_allocate(size_t bytes) {
  const size_t aligned = (bytes + 15) / 16 * 16;
  const size_t pages = (aligned + kPageBytes - 1) / kPageBytes * kPageBytes;
  char *start = (char *)mmap(nullptr, pages + kPageBytes, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED || mprotect(start + pages, kPageBytes, PROT_NONE) != 0) {
    abort();
  }
  memset(start, kNaN, pages);
  char *array = start + pages - aligned;
  mappings[array] = {start, pages, bytes};
  return array;
}

void fb_host_release(void *memory) {
  const auto found = mappings.find(memory);
  const Mapping mapping = found->second;
  const char *array = (const char *)memory;
  for (const char *at = mapping.start; at < mapping.start + mapping.bytes; at++) {
    const bool is_ours = at >= array && at < array + mapping.array_bytes;
    if (!is_ours && *at != (char)kNaN) {
      fail("an array's surroundings were written (the kernel named is the last that ran)");
    }
    at = is_ours ? array + mapping.array_bytes - 1 : at;
  }
  mappings.erase(found);
  munmap(mapping.start, mapping.bytes + kPageBytes);
}

// The faulting thread's stack is a fiber's, which may be the very fault: a stack of its own.
void fb_host_report_faults() {
  static char stack[64 << 10];
  stack_t own = {};
  own.ss_sp = stack;
  own.ss_size = sizeof(stack);
  sigaltstack(&own, nullptr);
  struct sigaction action = {};
  action.sa_handler = on_fault;
  action.sa_flags = SA_ONSTACK;
  sigaction(SIGSEGV, &action, nullptr);
  sigaction(SIGBUS, &action, nullptr);
}
#endif

void fb_host_syncthreads(int line) {
  self().barrier = line;
  at_barrier++;
  pause(kAtBarrier);
}

uint64_t fb_host_shuffle(fb_host_shuffle_kind kind, uint32_t mask, uint64_t value, uint32_t by) {
  self().lane.value = value;
  self().lane.by = by;
  meet(kShuffle, kind, mask);
  return self().lane.result;
}

uint32_t fb_host_ballot(uint32_t mask, bool value) {
  self().lane.value = value;
  meet(kBallot, 0, mask);
  return (uint32_t)self().lane.result;
}

void fb_host_syncwarp(uint32_t mask) { meet(kSyncWarp, 0, mask); }

void fb_host_mma_m16n8k16(float d[4], const uint32_t a[4], const uint32_t b[2],
                          const float c[4]) {
  Lane &own = self().lane;
  memcpy(own.a, a, 16);
  memcpy(own.b, b, 8);
  memcpy(own.c, c, 16);
  meet(kMma, 0, ~0u);
  memcpy(d, own.d, 16);
}

void fb_host_ldmatrix(uint32_t *r, int count, bool trans, const void *row) {
  self().lane.row = row;
  meet(kLdmatrix, count * 2 + trans, ~0u);
  memcpy(r, self().lane.r, 4 * count);
}

// The place is poisoned at once and written at the wait: the machine may do it any time between.
void fb_host_cp_async(void *dst, const void *src, int bytes, int src_bytes) {
  if ((uintptr_t)dst % bytes != 0 || (src_bytes > 0 && (uintptr_t)src % bytes != 0)) {
    fail("cp.async between addresses that are not aligned");
  }
  const char *to = (const char *)dst, *begin = dynamic_shared;
  if (to < begin || to + bytes > begin + dynamic_shared_bytes) {
    fail("cp.async to outside the block's dynamic shared memory");
  }
  memset(dst, kNaN, bytes);
  self().copies.push_back({dst, src, bytes, src_bytes, self().groups});
}

void fb_host_cp_async_commit() { self().groups++; }

void fb_host_cp_async_wait(int pending) {
  std::vector<Copy> &copies = self().copies;
  const int until = self().groups - pending;
  size_t kept = 0;
  for (const Copy &copy : copies) {
    if (copy.group >= until) {
      copies[kept++] = copy;
      continue;
    }
    if (copy.source_bytes > 0) {
      memcpy(copy.to, copy.from, copy.source_bytes);
    }
    memset((char *)copy.to + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
  }
  copies.resize(kept);
}

void *fb_host_dynamic_shared() { return dynamic_shared; }
