// Sampling against an exact reference of src/device/cpu/sample: the same filters in f64, the draw
// inverted with the same uniform number. Where a cut or the draw lies within 1e-6 of a boundary,
// the token on either side is right.
#include <algorithm>
#include <set>

#include "reference.h"

namespace {

constexpr uint32_t kInPrompt = 1u << 31;
constexpr double kNear = 1e-6;

uint64_t mix(uint64_t bits) {
  bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9ull;
  bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebull;
  return bits ^ (bits >> 31);
}

double uniform(uint64_t seed, uint32_t position) {
  const uint64_t key = mix(seed ^ 0x9e3779b97f4a7c15ull);
  const uint64_t bits = mix(key ^ mix(position * 0xd1b54a32d192ed03ull));
  return (double)(bits >> 11) * 0x1p-53;
}

struct Request {
  std::string name;
  fb_slot slot;
  std::vector<fb_bias> biases;
  std::vector<float> logits;
  std::vector<uint32_t> counts;
  uint32_t position;
};

struct Candidate {
  float logit;
  uint32_t token;
};
bool is_before(const Candidate &a, const Candidate &b) {
  return a.logit != b.logit ? a.logit > b.logit : a.token < b.token;
}

std::vector<Candidate> ordered(const std::vector<float> &logits) {
  std::vector<Candidate> all;
  for (uint32_t token = 0; token < logits.size(); token++) {
    if (logits[token] == logits[token]) {
      all.push_back({logits[token], token});
    }
  }
  std::sort(all.begin(), all.end(), is_before);
  return all;
}

std::vector<float> adjusted(const Request &request) {
  std::vector<float> logits = request.logits;
  const fb_slot &slot = request.slot;
  const bool has_penalties = slot.repetition_penalty != 1 || slot.frequency_penalty != 0 ||
                             slot.presence_penalty != 0;
  for (uint32_t token = 0; token < logits.size() && has_penalties; token++) {
    const uint32_t count = request.counts[token], output = count & ~kInPrompt;
    float &logit = logits[token];
    if (count != 0) {
      logit = logit > 0 ? logit / slot.repetition_penalty : logit * slot.repetition_penalty;
    }
    if (output > 0) {
      logit -= slot.frequency_penalty * (float)output + slot.presence_penalty;
    }
  }
  for (const fb_bias &bias : request.biases) {
    if (bias.token < logits.size()) {
      logits[bias.token] += bias.bias;
    }
  }
  return logits;
}

uint32_t greedy(const std::vector<float> &logits, float max) {
  for (uint32_t token = 0; token < logits.size() && (max > -INFINITY || token < 64); token++) {
    if (logits[token] == max) {
      return token;
    }
  }
  return 0;
}

// How many of the most likely are kept, with top-p and min-p a little tighter or wider.
size_t kept(const std::vector<Candidate> &all, const std::vector<double> &weights,
            const fb_slot &slot, size_t vocab, double p_factor, double min_factor) {
  size_t end = slot.top_k > 0 && slot.top_k < vocab ? std::min<size_t>(slot.top_k, all.size())
                                                     : all.size();
  if (slot.top_p < 1) {
    double mass = 0, running = 0;
    for (size_t i = 0; i < end; i++) {
      mass += weights[i];
    }
    const double target = slot.top_p * mass * p_factor;
    for (size_t i = 0; i < end; i++) {
      running += weights[i];
      if (running >= target) {
        end = i + 1;
        break;
      }
    }
  }
  while (slot.min_p > 0 && end > 1 && weights[end - 1] < std::min(slot.min_p, 1.0f) * min_factor) {
    end--;
  }
  return end;
}

// Adds the tokens whose stretch holds the uniform number, within kNear of all.
void draw(std::set<uint32_t> &right, const std::vector<Candidate> &all,
          const std::vector<double> &weights, size_t end, double number) {
  std::vector<std::pair<uint32_t, double>> by_id;
  double total = 0, running = 0;
  for (size_t i = 0; i < end; i++) {
    by_id.push_back({all[i].token, weights[i]});
    total += weights[i];
  }
  std::sort(by_id.begin(), by_id.end());
  for (const auto &[token, weight] : by_id) {
    const double before = running;
    running += weight;
    if (weight > 0 && number * total >= before - kNear * total &&
        number * total <= running + kNear * total) {
      right.insert(token);
    }
  }
}

std::set<uint32_t> right_tokens(const Request &request) {
  const std::vector<float> logits = adjusted(request);
  const std::vector<Candidate> all = ordered(logits);
  const float max = all.empty() ? -INFINITY : all[0].logit;
  const fb_slot &slot = request.slot;
  if (!std::isfinite(max) || !(slot.temperature > 0)) {
    return {greedy(logits, max)};
  }
  const float factor = std::min(1.44269504f / slot.temperature, 1e30f);
  std::vector<double> weights;
  for (const Candidate &candidate : all) {
    const double weight = exp2((double)((candidate.logit - max) * factor));
    weights.push_back(weight < 0x1p-44 ? 0 : weight);
  }
  std::set<uint32_t> right;
  const double number = uniform(slot.seed, request.position);
  std::set<size_t> ends; // one, unless a cut is close
  for (const double p_factor : {1 - kNear, 1.0, 1 + kNear}) {
    for (const double min_factor : {1 - kNear, 1 + kNear}) {
      ends.insert(kept(all, weights, slot, logits.size(), p_factor, min_factor));
    }
  }
  for (const size_t end : ends) {
    draw(right, all, weights, end, number);
  }
  return right;
}

void check_logprobs(const Request &request, const fb_sampled &result, const std::string &what) {
  const std::vector<Candidate> all = ordered(request.logits);
  const uint32_t asked = request.slot.logprobs;
  if (asked == 0) {
    check(result.logprob == 0 && result.top_count == 0, what + ": logprobs nobody asked for");
    return;
  }
  const size_t count = std::min<size_t>({asked - 1, FB_TOP_MAX, all.size()});
  if (!check(result.top_count == count, what + ": number of alternatives") || all.empty() ||
      !std::isfinite(all[0].logit)) {
    return;
  }
  double sum = 0;
  for (const Candidate &candidate : all) {
    sum += exp((double)candidate.logit - all[0].logit);
  }
  const double log_total = all[0].logit + log(sum);
  const auto is_close = [&](float logprob, float logit) {
    const double want = logit - log_total;
    return logit == -INFINITY ? logprob == -INFINITY : fabs(logprob - want) <= 2e-5 * (1 + fabs(want));
  };
  check(is_close(result.logprob, request.logits[result.token]), what + ": its log-probability");
  for (size_t i = 0; i < count; i++) {
    check(result.top_tokens[i] == all[i].token, what + ": alternative " + std::to_string(i));
    check(is_close(result.top_logprobs[i], all[i].logit),
          what + ": log-probability of alternative " + std::to_string(i));
  }
}

void run_all(const std::vector<Request> &requests, uint32_t vocab) {
  const uint32_t sampled = (uint32_t)requests.size(), slots = sampled + 1, grid = sampled + 2;
  std::vector<float> logits;
  std::vector<fb_slot> states(slots);
  std::vector<fb_bias> biases(1);
  std::vector<uint32_t> counts((size_t)slots * vocab), sampled_rows, last(slots, 77);
  std::vector<fb_row> rows(sampled);
  // Row i belongs to slot (i + 1) % slots and lies at sampled - 1 - i.
  for (uint32_t i = 0; i < sampled; i++) {
    const Request &request = requests[i];
    const uint32_t slot = (i + 1) % slots;
    logits.insert(logits.end(), request.logits.begin(), request.logits.end());
    states[slot] = request.slot;
    states[slot].bias_start = (uint32_t)biases.size();
    states[slot].bias_count = (uint32_t)request.biases.size();
    biases.insert(biases.end(), request.biases.begin(), request.biases.end());
    std::copy(request.counts.begin(), request.counts.end(), &counts[(size_t)slot * vocab]);
    const uint32_t tokens = 1 + i % 3;
    sampled_rows.push_back(sampled - 1 - i);
    rows[sampled - 1 - i] = {i * 3, tokens, request.position - tokens, 0, slot, i};
  }
  sampled_rows.insert(sampled_rows.end(), 2, FB_NONE);
  Array<float> logits_at(logits);
  Array<uint32_t> sampled_rows_at(sampled_rows), counts_at(counts), last_at(last);
  Array<fb_row> rows_at(rows);
  Array<fb_step> step(std::vector<fb_step>{{1, sampled, sampled + 1, 0}});
  Array<fb_slot> states_at(states);
  Array<fb_bias> biases_at(biases);
  Array<fb_sampled> results_at(grid);
  device->run("forebay_sample", {grid}, 1024, 0,
              fb_sample{logits_at.at(), sampled_rows_at.at(), rows_at.at(), step.at(),
                        states_at.at(), biases_at.at(), counts_at.at(), last_at.at(),
                        results_at.at(), vocab, 0});
  const std::vector<fb_sampled> got = results_at.values();
  const std::vector<uint32_t> last_now = last_at.values();
  std::vector<uint32_t> counted = counts;
  for (uint32_t i = 0; i < sampled; i++) {
    const uint32_t slot = (i + 1) % slots, token = got[i].token;
    const std::string what = "sampling among " + std::to_string(vocab) + ", " + requests[i].name;
    const std::set<uint32_t> right = right_tokens(requests[i]);
    std::string wanted = what + ": token " + std::to_string(token) + " instead of";
    for (const uint32_t its : right) {
      wanted += " " + std::to_string(its);
    }
    if (check(right.count(token) == 1, wanted) || token < vocab) {
      check(last_now[slot] == token, what + ": the slot's last token");
      uint32_t &count = counted[(size_t)slot * vocab + token];
      count += (count & ~kInPrompt) < kInPrompt - 1 ? 1 : 0;
      check_logprobs(requests[i], got[i], what);
    }
  }
  check(is_untouched(&got[sampled], 2), "sampling: wrote a padded row");
  check(counts_at.values() == counted, "sampling among " + std::to_string(vocab) + ": counts");
}

struct Filters {
  const char *name;
  float temperature, top_p, min_p;
  uint32_t top_k;
  float repetition, frequency, presence;
  uint32_t biases, logprobs;
};

const Filters filters[] = {
    {"greedy", 0, 1, 0, 0, 1, 0, 0, 0, 0},
    {"greedy with alternatives", 0, 1, 0, 0, 1, 0, 0, 0, 6},
    {"plain", 1, 1, 0, 0, 1, 0, 0, 0, 0},
    {"all alternatives", 1, 1, 0, 0, 1, 0, 0, 0, 21},
    {"own logprob", 0.8f, 1, 0, 0, 1, 0, 0, 0, 1},
    {"top-p 0.9", 1, 0.9f, 0, 0, 1, 0, 0, 0, 0},
    {"top-p 0.5, hot", 1.7f, 0.5f, 0, 0, 1, 0, 0, 0, 3},
    {"top-p 0.999", 1, 0.999f, 0, 0, 1, 0, 0, 0, 0},
    {"top-p 0", 1, 0, 0, 0, 1, 0, 0, 0, 0},
    {"top-k 1", 1, 1, 0, 1, 1, 0, 0, 0, 0},
    {"top-k 40", 0.9f, 1, 0, 40, 1, 0, 0, 0, 0},
    {"top-k 700", 1.2f, 1, 0, 700, 1, 0, 0, 0, 0},
    {"top-k 40 and top-p 0.8", 1, 0.8f, 0, 40, 1, 0, 0, 0, 2},
    {"min-p 0.05", 1, 1, 0.05f, 0, 1, 0, 0, 0, 0},
    {"min-p 1", 1, 1, 1, 0, 1, 0, 0, 0, 0},
    {"all filters", 0.7f, 0.95f, 0.02f, 50, 1.1f, 0.2f, 0.3f, 5, 4},
    {"penalties", 0.7f, 1, 0, 0, 1.3f, 0.5f, -0.4f, 0, 4},
    {"greedy with penalties", 0, 1, 0, 0, 1.3f, 0, 0.7f, 0, 0},
    {"bias", 1, 1, 0, 0, 1, 0, 0, 20, 3},
    {"penalties and bias", 1, 0.9f, 0, 0, 0.8f, 0.1f, 0, 300, 3},
    {"nearly cold", 1e-6f, 1, 0, 0, 1, 0, 0, 0, 0},
    {"very hot", 100, 0.9f, 0, 0, 1, 0, 0, 0, 0},
};

enum Distribution { BELL, FLAT, PEAKED, TIES, EQUAL, DISTRIBUTIONS };

Request request_of(Random &random, const Filters &f, Distribution kind, uint32_t vocab) {
  const char *kinds[] = {"", ", flat", ", peaked", ", ties", ", all equal"};
  Request request;
  request.name = std::string(f.name) + kinds[kind];
  request.slot = {random.bits(), f.temperature, f.top_p, f.min_p, f.repetition, f.frequency,
                  f.presence, f.top_k, 0, 0, f.logprobs};
  request.position = 3 + random.below(4000);
  request.counts.assign(vocab, 0);
  for (uint32_t i = 0; i < std::min(vocab / 2, 300u); i++) {
    request.counts[random.below(vocab)] = random.below(4) | random.below(2) << 31;
  }
  for (uint32_t i = 0; i < f.biases; i++) {
    // Some twice, some outside the vocabulary.
    request.biases.push_back({random.below(i % 7 == 0 ? vocab * 2 : std::min(vocab, 200u)),
                              (float)random.bell() * 4});
  }
  for (uint32_t token = 0; token < vocab; token++) {
    const double bell = random.bell();
    const double logit[] = {bell * 2.5, 5 + bell * 0.01, bell * 3 + (random.below(50) == 0) * 9,
                            floor(bell * 3) / 2, 1.25};
    request.logits.push_back((float)logit[kind]);
  }
  return request;
}

void set_oddities(std::vector<Request> &requests, uint32_t vocab) {
  Random random(vocab);
  for (uint32_t kind = 0; kind < 7; kind++) {
    Request request = request_of(random, filters[kind % 2 == 0 ? 5 : 1], BELL, vocab);
    std::vector<float> &logits = request.logits;
    const char *names[] = {"no number at all", "all minus infinity", "some no numbers",
                           "two plus infinity", "one that is not minus infinity",
                           "minus infinity after no number", "one number"};
    request.name = names[kind];
    for (uint32_t token = 0; token < vocab; token++) {
      float &logit = logits[token];
      logit = kind == 0 ? NAN : kind == 1 || kind == 4 ? -INFINITY : kind == 6 ? NAN : logit;
      if ((kind == 2 && token % 3 == 0) || (kind == 5 && token % 64 < 5)) {
        logit = NAN;
      } else if (kind == 5) {
        logit = -INFINITY;
      }
    }
    if (kind == 3) {
      logits[vocab / 2] = logits[vocab - 2] = INFINITY;
    } else if (kind == 4 || kind == 6) {
      logits[vocab - 3] = -2.5f;
    }
    requests.push_back(request);
  }
}

// How often each token comes, against how often it should: chi-square, of which chance alone gives
// more than the limit once in 10,000. `by_seed`: one position of many seeds, or the other way round.
void frequency_case(const Filters &f, bool by_seed, uint32_t rounds) {
  const uint32_t vocab = 40, rows_count = 128;
  Random random(rounds + by_seed);
  const Request request = request_of(random, f, BELL, vocab);
  const std::vector<Candidate> all = ordered(request.logits);
  std::vector<double> weights, chance(vocab);
  for (const Candidate &candidate : all) {
    weights.push_back(exp2((candidate.logit - all[0].logit) * 1.44269504088896 / f.temperature));
  }
  const size_t end = kept(all, weights, request.slot, vocab, 1, 1);
  double total = 0;
  for (size_t i = 0; i < end; i++) {
    total += weights[i];
  }
  for (size_t i = 0; i < end; i++) {
    chance[all[i].token] = weights[i] / total;
  }
  std::vector<double> seen(vocab);
  std::vector<float> logits;
  std::vector<uint32_t> indices;
  for (uint32_t i = 0; i < rows_count; i++) {
    logits.insert(logits.end(), request.logits.begin(), request.logits.end());
    indices.push_back(i);
  }
  const Array<float> logits_at(logits);
  const Array<uint32_t> indices_at(indices), last(rows_count);
  const Array<fb_bias> biases(1);
  const Array<fb_step> step(std::vector<fb_step>{{rows_count, rows_count, rows_count, 0}});
  for (uint32_t round = 0; round < rounds; round++) {
    std::vector<fb_row> rows;
    std::vector<fb_slot> slots(rows_count, request.slot);
    for (uint32_t i = 0; i < rows_count; i++) {
      const uint32_t number = round * rows_count + i;
      rows.push_back({i, 1, by_seed ? 17 : number, 0, i, i});
      slots[i].seed = by_seed ? number : 12345;
    }
    const Array<fb_row> rows_at(rows);
    const Array<fb_slot> slots_at(slots);
    const Array<uint32_t> counts(std::vector<uint32_t>(rows_count * vocab));
    const Array<fb_sampled> results_at(rows_count);
    device->run("forebay_sample", {rows_count}, 1024, 0,
                fb_sample{logits_at.at(), indices_at.at(), rows_at.at(), step.at(), slots_at.at(),
                          biases.at(), counts.at(), last.at(), results_at.at(), vocab, 0});
    for (const fb_sampled &result : results_at.values()) {
      seen[std::min(result.token, vocab - 1)]++;
    }
  }
  // Tokens that are hardly ever due are counted together.
  const double draws = (double)rounds * rows_count;
  double chi_square = 0, rare_seen = 0, rare_due = 0;
  int terms = 0;
  bool all_allowed = true;
  const auto add = [&](double count, double due) {
    chi_square += (count - due) * (count - due) / due;
    terms++;
  };
  for (uint32_t token = 0; token < vocab; token++) {
    const double due = chance[token] * draws;
    all_allowed = all_allowed && (due > 0 || seen[token] == 0);
    if (due >= 8) {
      add(seen[token], due);
    } else {
      rare_seen += seen[token];
      rare_due += due;
    }
  }
  if (rare_due > 0) {
    add(rare_seen, rare_due);
  }
  const double degrees = terms - 1, part = 2 / (9 * degrees);
  const double limit = degrees * pow(1 - part + 3.719 * sqrt(part), 3); // Wilson and Hilferty
  const std::string what = std::string("frequencies, ") + f.name + (by_seed ? ", by seed" : ", by position");
  check(all_allowed, what + ": a token that is cut came");
  check(terms > 2 && chi_square < limit, what + ": chi-square " + std::to_string(chi_square) + " of " +
                                             std::to_string(degrees) + " degrees, limit " +
                                             std::to_string(limit));
}

void vocab_case(uint32_t vocab, uint32_t every) {
  Random random(vocab);
  std::vector<Request> requests;
  uint32_t index = 0;
  for (const Filters &f : filters) {
    for (int kind = 0; kind < DISTRIBUTIONS; kind++) {
      if (index++ % every == 0) {
        requests.push_back(request_of(random, f, (Distribution)kind, vocab));
      }
    }
  }
  set_oddities(requests, vocab);
  run_all(requests, vocab);
}

} // namespace

void test_sampling(bool subset) {
  if (subset) {
    vocab_case(1003, 7);
    return;
  }
  vocab_case(50, 1);
  vocab_case(1003, 1);
  vocab_case(5000, 1);
  vocab_case(49152, device->is_gpu() ? 2 : 6);
  if (device->is_gpu()) {
    vocab_case(128256, 2);
  }
  // 1e5 draws each on a GPU. On a CPU a draw takes 10 ms, and rows above say more by the draw.
  const uint32_t rounds = device->is_gpu() ? 800 : 3; // of 128 draws
  frequency_case({"hot, top-p 0.9", 1.3f, 0.9f, 0, 0, 1, 0, 0, 0, 0}, true, rounds);
  frequency_case({"plain", 1, 1, 0, 0, 1, 0, 0, 0, 0}, false, rounds);
  if (device->is_gpu()) {
    frequency_case({"hot, top-p 0.9", 1.3f, 0.9f, 0, 0, 1, 0, 0, 0, 0}, false, rounds);
    frequency_case({"plain", 1, 1, 0, 0, 1, 0, 0, 0, 0}, true, rounds);
    frequency_case({"top-k 12, min-p", 1.5f, 1, 0.02f, 12, 1, 0, 0, 0, 0}, true, rounds);
  }
}
