// collectives_probe: runs one collective over given data, many times back to back, so that tests can compare every bit
// that every rank received. Host twin: jit/collectives_probe.py.
#include <cuda/std/cstdint>

#include "collectives/async_gather.cuh"
#include "collectives/cluster_gather.cuh"
#include "collectives/cluster_reduce.cuh"
#include "collectives/team.cuh"

namespace clusterfusion {

constexpr int kTeamThreads = 96;       // not a power of two, and less than the longer vectors
constexpr int kBystanderThreads = 32;  // warps of a PartialTeam's CTA that never take part
constexpr int kTeamBarrier = 3;

// An associative operator that does not commute: composition of x -> scale * x + offset, modulo 2^32.
struct Affine {
  unsigned scale, offset;
};
struct Compose {
  __device__ __forceinline__ Affine operator()(Affine first, Affine second) const {
    return {first.scale * second.scale, first.offset * second.scale + second.offset};
  }
};

// joined: a partial team whose CTAs leave together. They need not; but racecheck does not follow mbarriers from CTA to CTA
// and takes a write to a CTA that may have left for an error.
enum class TeamKind { whole, partial, joined };

// Makes ranks reach the exchanges at different and changing times, up to skew_ns apart.
__device__ __forceinline__ void stagger(unsigned rank, int round, unsigned skew_ns) {
  constexpr unsigned kMix = 2654435761u;  // Knuth's multiplicative hash
  if (skew_ns != 0) __nanosleep(((rank * 8191u + round) * kMix >> 16) % skew_ns);
}

// Waits until the whole cluster runs, and calls body(team) for the members of the team.
template <int kClusterSize, TeamKind kTeam, typename Body>
__device__ __forceinline__ void with_team(Body body) {
  if constexpr (kTeam == TeamKind::whole) {
    cluster_arrive();
    cluster_wait();
    WholeTeam<kClusterSize, kTeamThreads> team;
    body(team);
  } else {
    using Team = PartialTeam<kClusterSize, kTeamThreads, kBystanderThreads, kTeamBarrier>;
    __shared__ typename Team::Scratch scratch;
    if (threadIdx.x == 0) Team::init(scratch);
    cluster_arrive();
    cluster_wait();
    if (threadIdx.x < kBystanderThreads) return;
    Team team(scratch);
    body(team);
    if constexpr (kTeam == TeamKind::joined) {
      cluster_arrive();  // threads that have exited are not waited for
      cluster_wait();
    }
  }
}

template <TeamKind kTeam>
constexpr int kProbeThreads = kTeamThreads + (kTeam == TeamKind::whole ? 0 : kBystanderThreads);

// What the members of a team do; functors, because NVRTC 13.0 takes a generic lambda for a host function.
template <typename T, typename Op, int kLength, int kClusterSize, Exchange kExchange>
struct ReduceRounds {
  using Reduce = ClusterReduce<T, kLength, kClusterSize, kExchange, Op>;
  typename Reduce::Scratch& scratch;
  const T* in;
  Accumulator<T>* out;
  unsigned* expired;
  int rounds;
  unsigned skew_ns;

  template <typename Team>
  __device__ void operator()(Team& team) const {
    Reduce reduce(scratch);
    for (int round = 0; round < rounds; round++) {
      const cuda::std::int64_t base = (static_cast<cuda::std::int64_t>(round) * gridDim.x + blockIdx.x) * kLength;
      stagger(team.rank(), round, skew_ns);
      reduce.exchange(team, kLength, [&](int i) { return in[base + i]; });
      // Read by other threads than those that sent, so that a missing barrier shows.
      for (int i = team.threads - 1 - team.thread(); i < kLength; i += team.threads) out[base + i] = reduce.result(i);
    }
    if (team.expired()) atomicAdd(expired, 1u);
  }
};

// A ClusterGather waits by its team, an AsyncGather by itself.
template <typename Team, typename T, int kLength, int kClusterSize, Exchange kExchange>
__device__ bool has_expired(const Team& team, const ClusterGather<T, kLength, kClusterSize, kExchange>&) {
  return team.expired();
}
template <typename Team, typename T, int kLength, int kClusterSize>
__device__ bool has_expired(const Team&, const AsyncGather<T, kLength, kClusterSize>& gather) {
  return gather.expired();
}

template <typename T, int kLength, typename Gather_>
struct GatherRounds {
  using Gather = Gather_;
  typename Gather::Scratch& scratch;
  const T* in;
  T* out;
  unsigned* expired;
  int rounds;
  unsigned skew_ns;

  template <typename Team>
  __device__ void operator()(Team& team) const {
    Gather gather(scratch);
    for (int round = 0; round < rounds; round++) {
      const cuda::std::int64_t block = static_cast<cuda::std::int64_t>(round) * gridDim.x + blockIdx.x;
      stagger(team.rank(), round, skew_ns);
      gather.exchange(team, [&](int i) { return in[block * kLength + i]; });
      for (int i = team.threads - 1 - team.thread(); i < Gather::kTotal; i += team.threads) {
        out[block * Gather::kTotal + i] = gather.result()[i];
      }
    }
    if (has_expired(team, gather)) atomicAdd(expired, 1u);
  }
};

// in and out: [rounds, clusters, cluster size, kLength], in of T, out of its accumulator. expired counts lost waits.
template <typename T, typename Op, int kLength, int kClusterSize, Exchange kExchange, TeamKind kTeam>
__global__ void __launch_bounds__(kProbeThreads<kTeam>, 1)
reduce_probe(const T* __restrict__ in, Accumulator<T>* __restrict__ out, unsigned* expired, int rounds, unsigned skew_ns) {
  using Rounds = ReduceRounds<T, Op, kLength, kClusterSize, kExchange>;
  __shared__ typename Rounds::Reduce::Scratch scratch;
  with_team<kClusterSize, kTeam>(Rounds{scratch, in, out, expired, rounds, skew_ns});
}

// in: [rounds, clusters, cluster size, kLength]; out: [rounds, clusters, cluster size, cluster size * kLength].
template <typename T, int kLength, int kClusterSize, Exchange kExchange, TeamKind kTeam>
__global__ void __launch_bounds__(kProbeThreads<kTeam>, 1)
gather_probe(const T* __restrict__ in, T* __restrict__ out, unsigned* expired, int rounds, unsigned skew_ns) {
  using Rounds = GatherRounds<T, kLength, ClusterGather<T, kLength, kClusterSize, kExchange>>;
  __shared__ typename Rounds::Gather::Scratch scratch;
  with_team<kClusterSize, kTeam>(Rounds{scratch, in, out, expired, rounds, skew_ns});
}

// The same of an AsyncGather.
template <typename T, int kLength, int kClusterSize, TeamKind kTeam>
__global__ void __launch_bounds__(kProbeThreads<kTeam>, 1)
async_gather_probe(const T* __restrict__ in, T* __restrict__ out, unsigned* expired, int rounds, unsigned skew_ns) {
  using Rounds = GatherRounds<T, kLength, AsyncGather<T, kLength, kClusterSize>>;
  __shared__ typename Rounds::Gather::Scratch scratch;
  if (threadIdx.x == 0) Rounds::Gather::template init<kTeamThreads>(scratch);
  with_team<kClusterSize, kTeam>(Rounds{scratch, in, out, expired, rounds, skew_ns});
}

}  // namespace clusterfusion
