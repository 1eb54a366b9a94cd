// The host run finds what it is there to find: kernels with one planted fault each, run in a process
// of their own, must be stopped with the right words or give what differs from what is right.
#include <sys/wait.h>
#include <unistd.h>

#include "../reference.h"
#include "planted.h"

namespace {

constexpr uint32_t kThreads = 64, kBlocks = 8;

// Words that the report has, without and with AddressSanitizer; none: the result is wrong.
struct Fault {
  const char *name, *words, *sanitizer_words;
};

const char *const kSanitizer = "AddressSanitizer";
const Fault faults[] = {
    {"no_barrier", nullptr, nullptr},
    {"no_second_barrier", nullptr, nullptr},
    {"no_syncwarp", nullptr, nullptr},
    {"no_wait", nullptr, nullptr},
    {"wait_for_too_few", nullptr, nullptr},
    {"wait_without_barrier", nullptr, nullptr},
    {"nothing_written", nullptr, nullptr},
    {"old_shared", nullptr, nullptr},
    {"order_of_blocks", nullptr, nullptr},
    {"copy_beyond_shared", "outside the block's dynamic shared", "outside the block's dynamic shared"},
    {"barrier_of_some", "never come", "never come"},
    {"two_barriers", "different barriers", "different barriers"},
    {"shuffle_of_some", "never come", "never come"},
    {"shuffle_from_outside", "takes no part", "takes no part"},
    {"write_beyond", "nobody's", kSanitizer},
    {"read_beyond", "nobody's", kSanitizer},
    {"shared_beyond", "nobody's", kSanitizer},
    {"write_before", "surroundings", kSanitizer},
};

// Whether the result is right.
bool run(const std::string &name) {
  std::vector<uint32_t> in;
  for (uint32_t i = 0; i < kBlocks * kThreads; i++) {
    in.push_back(i + 1000);
  }
  Array<uint32_t> in_at(in), out(in.size());
  device->run("forebay_planted_" + name, {kBlocks}, kThreads, kThreads * 4,
              fb_planted{in_at.at(), out.at()});
  const std::vector<uint32_t> got = out.values();
  bool is_right = true;
  for (uint32_t i = 0; i < in.size(); i++) {
    is_right = is_right && got[i] == in[i / kThreads * kThreads + (i + 1) % kThreads];
  }
  return is_right;
}

struct Outcome {
  bool ended, is_right; // or was stopped
  std::string words;
};

Outcome run_apart(const std::string &name) {
  int ends[2];
  fflush(nullptr);
  const pid_t child = pipe(ends) == 0 ? fork() : -1;
  if (child == 0) {
    dup2(ends[1], 2);
    close(ends[0]);
    _exit(run(name) ? 10 : 11);
  }
  Outcome outcome = {};
  close(ends[1]);
  char part[4096];
  for (ssize_t count; (count = read(ends[0], part, sizeof(part))) > 0;) {
    outcome.words.append(part, count);
  }
  close(ends[0]);
  int status = 0;
  if (child < 0 || waitpid(child, &status, 0) != child) {
    outcome.words = "no process could be started";
    return outcome;
  }
  outcome.is_right = WIFEXITED(status) && WEXITSTATUS(status) == 10;
  outcome.ended = outcome.is_right || (WIFEXITED(status) && WEXITSTATUS(status) == 11);
  return outcome;
}

} // namespace

void test_planted(bool) {
#ifdef __SANITIZE_ADDRESS__
  const bool sanitized = true;
#else
  const bool sanitized = false;
#endif
  const Outcome sound = run_apart("nothing");
  check(sound.is_right, "the kernel without a fault is right: " + sound.words);
  for (const Fault &fault : faults) {
    const Outcome outcome = run_apart(fault.name);
    const char *words = sanitized ? fault.sanitizer_words : fault.words;
    const bool found = words == nullptr
                           ? outcome.ended && !outcome.is_right
                           : !outcome.ended && outcome.words.find(words) != std::string::npos;
    check(found, std::string("a planted fault is found: ") + fault.name + "; said: " + outcome.words);
  }
}
