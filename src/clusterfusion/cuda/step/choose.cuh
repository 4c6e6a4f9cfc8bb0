// The choice of the next token, over the logits of a launch: exact in any order, so the same in every run.
//
// Greedy: the largest logit, the lowest index among equals. With a temperature: Gumbel-max (Gumbel 1954), the largest of
// logit / temperature + g, where g = -log(-log u) and u comes from a counter-based generator on (seed, position, index), so
// that a choice depends on nothing else. engine/gumbel.py computes the same on the host.
#pragma once

#include <cuda/std/cstdint>
#include <cuda/std/limits>

#include "collectives/block_sum.cuh"

namespace clusterfusion {

// Philox4x32-10 (Salmon, Moraes, Dror and Shaw 2011): word `index % 4` of the block that counter (index / 4, position) gives.
__device__ __forceinline__ unsigned philox_word(unsigned long long seed, unsigned position, unsigned index) {
  constexpr unsigned kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u, kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
  unsigned c[4] = {index / 4, position, 0, 0};
  unsigned k0 = static_cast<unsigned>(seed), k1 = static_cast<unsigned>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const unsigned high0 = __umulhi(kMultiplier0, c[0]), low0 = kMultiplier0 * c[0];
    const unsigned high1 = __umulhi(kMultiplier1, c[2]), low1 = kMultiplier1 * c[2];
    c[0] = high1 ^ c[1] ^ k0, c[1] = low1, c[2] = high0 ^ c[3] ^ k1, c[3] = low0;
    k0 += kWeyl0, k1 += kWeyl1;
  }
  const unsigned which = index % 4;
  return which == 0 ? c[0] : which == 1 ? c[1] : which == 2 ? c[2] : c[3];
}

__device__ __forceinline__ double gumbel(unsigned long long seed, unsigned position, unsigned index) {
  const double u = ((philox_word(seed, position, index) >> 9) + 0.5) * 0x1p-23;
  return -log(-log(u));
}

// A token and its score. In double precision, so that the order is the host's.
struct alignas(16) Candidate {
  double score;
  int token;
};
constexpr int kNobody = 0x7fffffff;  // the token of a candidate that every other one beats
__device__ __forceinline__ Candidate no_candidate() { return {-cuda::std::numeric_limits<double>::infinity(), kNobody}; }

// The higher score, the lower token among equals. NaN beats all, so that it shows.
__device__ __forceinline__ bool beats(const Candidate& a, const Candidate& b) {
  if (a.score != a.score || b.score != b.score) return a.score != a.score && (b.score == b.score || a.token < b.token);
  return a.score > b.score || (a.score == b.score && a.token < b.token);
}

// The best of a warp's candidates, on every lane.
__device__ __forceinline__ Candidate warp_best(Candidate mine) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
    const Candidate other{__shfl_xor_sync(kAllLanes, mine.score, mask), __shfl_xor_sync(kAllLanes, mine.token, mask)};
    if (beats(other, mine)) mine = other;
  }
  return mine;
}

}  // namespace clusterfusion
