// Which expert works on which tokens: shared by the mixtures of packed and of dense experts.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"

namespace pio {

// (token, expert) pairs sorted by expert, tokens in order within one: the order of every sum, whatever the threads do.
struct Routing {
  std::vector<int64_t> experts;  // those that have tokens
  std::vector<int64_t> first;    // of each, its first pair; one more at the end
  std::vector<int64_t> token;    // of each pair
  std::vector<float> weight;     // of each pair

  int64_t pairs() const { return static_cast<int64_t>(token.size()); }
};

// experts, weights: [tokens, k]. Throws when an expert does not exist.
inline Routing sort_by_expert(const char* kernel, const int64_t* expert, const float* weight, int64_t tokens, int64_t k,
                              int64_t n_experts) {
  std::vector<int64_t> start(n_experts + 1, 0);
  for (int64_t i = 0; i < tokens * k; ++i) {
    if (expert[i] < 0 || expert[i] >= n_experts)
      throw std::invalid_argument(std::string(kernel) + ": expert " + std::to_string(expert[i]) + " of token " +
                                  std::to_string(i / k) + " is outside 0 .. " + std::to_string(n_experts - 1));
    ++start[expert[i] + 1];
  }
  Routing out;
  for (int64_t e = 0; e < n_experts; ++e) {
    if (start[e + 1] > 0) {
      out.experts.push_back(e);
      out.first.push_back(start[e]);
    }
    start[e + 1] += start[e];
  }
  out.first.push_back(tokens * k);
  out.token.resize(tokens * k);
  out.weight.resize(tokens * k);
  for (int64_t i = 0; i < tokens * k; ++i) {
    const int64_t at = start[expert[i]]++;
    out.token[at] = i / k;
    out.weight[at] = weight[i];
  }
  return out;
}

// sum[token[t]][0 .. 16) += weight[t] * y[t]; y of `count` rows of 16, rows of sum `stride` apart.
void add_weighted(const float* y, int count, const int64_t* tokens, const float* weights, float* sum, int64_t stride);

// out[t * stride ..][0 .. n) = sum[t * sum_stride ..], from element `first` of out on.
void store_sums(const float* sum, int64_t sum_stride, int64_t count, void* out, Dtype dtype, int64_t first,
                int64_t stride, int n);

}  // namespace pio
