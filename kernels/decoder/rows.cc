#include "decoder/rows.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "piece.h"
#include "thread_pool.h"

namespace pio::decoder {
namespace {

float widened(float x) { return x; }
float widened(uint16_t x) { return std::bit_cast<float>(static_cast<uint32_t>(x) << 16); }

// To nearest, ties to even; NaN stays NaN.
uint16_t narrowed(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  if (std::isnan(x)) return static_cast<uint16_t>(bits >> 16 | 64);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
void keep(float x, float* out) { *out = x; }
void keep(float x, uint16_t* out) { *out = narrowed(x); }

template <class T>
void add_of(Address a, Address b, Address out, int64_t begin, int64_t end) {
  const auto *x = reinterpret_cast<const T*>(a), *y = reinterpret_cast<const T*>(b);
  auto* z = reinterpret_cast<T*>(out);
  for (int64_t i = begin; i < end; ++i) keep(widened(x[i]) + widened(y[i]), z + i);
}

constexpr int64_t kPieceElements = kPieceBytes / 4;

struct Choice {
  float preference;
  int64_t expert;
  bool operator<(const Choice& other) const {
    return preference != other.preference ? preference > other.preference : expert < other.expert;
  }
};

// Everything outside the best groups, by the sum of their two best experts, becomes unchoosable.
void keep_best_groups(const Router& router, std::vector<Choice>& choices) {
  if (router.groups <= 1 || router.top_groups >= router.groups) return;
  const int64_t size = static_cast<int64_t>(choices.size()) / router.groups;
  std::vector<Choice> groups;
  for (int64_t g = 0; g < router.groups; ++g) {
    float best = -std::numeric_limits<float>::infinity(), next = best;
    for (int64_t i = g * size; i < (g + 1) * size; ++i) {
      next = std::max(next, std::min(best, choices[i].preference));
      best = std::max(best, choices[i].preference);
    }
    groups.push_back({size > 1 ? best + next : best, g});
  }
  std::sort(groups.begin(), groups.end());
  for (auto g = groups.begin() + router.top_groups; g != groups.end(); ++g)
    for (int64_t i = g->expert * size; i < (g->expert + 1) * size; ++i)
      choices[i].preference = -std::numeric_limits<float>::infinity();
}

// scores [count] become what weights are made of, choices their preferences.
template <class T>
void score(const Router& router, const T* logits, std::vector<float>& scores, std::vector<Choice>& choices) {
  const auto count = static_cast<int64_t>(scores.size());
  for (int64_t e = 0; e < count; ++e) scores[e] = widened(logits[e]);
  if (router.softmax) {
    const float top = *std::max_element(scores.begin(), scores.end());
    float total = 0;
    for (float& s : scores) total += s = std::exp(s - top);
    for (float& s : scores) s /= total;
  } else {
    for (float& s : scores) s = 1.0f / (1.0f + std::exp(-s));
  }
  const auto* correction = reinterpret_cast<const float*>(router.correction);
  for (int64_t e = 0; e < count; ++e) {
    const float preference = scores[e] + (correction ? correction[e] : 0.0f);
    // A NaN would break the order that sorting needs; its weight still poisons the output.
    choices[e] = {std::isnan(preference) ? std::numeric_limits<float>::infinity() : preference, e};
  }
  keep_best_groups(router, choices);
}

template <class T>
void choose_row(const Router& router, const T* logits, int64_t* experts, float* weights, std::vector<float>& scores,
                std::vector<Choice>& choices) {
  score(router, logits, scores, choices);
  std::partial_sort(choices.begin(), choices.begin() + router.top_k, choices.end());
  float total = router.softmax ? 0.0f : 1e-20f;
  for (int64_t k = 0; k < router.top_k; ++k) {
    experts[k] = choices[k].expert;
    weights[k] = scores[choices[k].expert];
    total += weights[k];
  }
  for (int64_t k = 0; k < router.top_k; ++k) {
    if (router.normalize) weights[k] /= total;
    weights[k] *= router.scale;
    if (router.softmax) {  // the softmax router hands its weights over in the element type of its logits
      T kept;
      keep(weights[k], &kept);
      weights[k] = widened(kept);
    }
  }
}

template <class T>
void choose_rows(const Router& router, Address logits, int64_t count, Address experts, Address weights, int64_t begin,
                 int64_t end) {
  std::vector<float> scores(static_cast<size_t>(count));
  std::vector<Choice> choices(static_cast<size_t>(count));
  for (int64_t row = begin; row < end; ++row)
    choose_row(router, reinterpret_cast<const T*>(logits) + row * count,
               reinterpret_cast<int64_t*>(experts) + row * router.top_k,
               reinterpret_cast<float*>(weights) + row * router.top_k, scores, choices);
}

}  // namespace

void add_rows(Address a, Address b, Address out, int64_t count, Dtype dtype, int threads) {
  parallel_for(count, kPieceElements, threads, [&](int64_t begin, int64_t end) {
    dtype == Dtype::f32 ? add_of<float>(a, b, out, begin, end) : add_of<uint16_t>(a, b, out, begin, end);
  });
}

void widen_rows(Address x, Address out, int64_t count, Dtype dtype, int threads) {
  if (dtype == Dtype::f32) {
    std::memcpy(reinterpret_cast<void*>(out), reinterpret_cast<const void*>(x), static_cast<size_t>(count) * 4);
    return;
  }
  parallel_for(count, kPieceElements, threads, [&](int64_t begin, int64_t end) {
    const auto* from = reinterpret_cast<const uint16_t*>(x);
    auto* to = reinterpret_cast<float*>(out);
    for (int64_t i = begin; i < end; ++i) to[i] = widened(from[i]);
  });
}

void copy_block(const Strided& from, const Strided& to, int64_t batch, int64_t heads, int64_t tokens, int64_t dim,
                size_t size, int threads) {
  const size_t bytes = static_cast<size_t>(dim) * size;
  const int64_t grain = std::max<int64_t>(1, kPieceBytes / static_cast<int64_t>(bytes));
  parallel_for(batch * heads * tokens, grain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = i % tokens, h = i / tokens % heads, b = i / tokens / heads;
      const auto source = from.data + static_cast<Address>(b * from.batch + h * from.head + t * from.token) * size;
      const auto target = to.data + static_cast<Address>(b * to.batch + h * to.head + t * to.token) * size;
      std::memcpy(reinterpret_cast<void*>(target), reinterpret_cast<const void*>(source), bytes);
    }
  });
}

void choose_experts(const Router& router, Address logits, int64_t rows, int64_t count, Dtype dtype, Address experts,
                    Address weights, int threads) {
  require(router.top_k > 0 && router.top_k <= count, "choose_experts: top_k must be 1 to the number of experts");
  require(router.groups <= 1 || count % router.groups == 0, "choose_experts: groups must be of equal size");
  parallel_for(rows, 16, threads, [&](int64_t begin, int64_t end) {
    router.softmax&& dtype == Dtype::bf16 ? choose_rows<uint16_t>(router, logits, count, experts, weights, begin, end)
                                          : choose_rows<float>(router, logits, count, experts, weights, begin, end);
  });
}

}  // namespace pio::decoder
