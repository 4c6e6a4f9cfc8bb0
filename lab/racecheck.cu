// The ring alone, in nine forms, for compute-sanitizer's racecheck: a laboratory tool.
//
//     nvcc -std=c++17 -O3 -lineinfo -arch=sm_90a -o racecheck lab/racecheck.cu
//     compute-sanitizer --tool racecheck ./racecheck FORM STAGES
//
// A producer lane copies STAGES stages through a ring of 8; 8 warps read them, each its tile of a stage. By the PTX memory model
// none of the forms has a race. With 8 stages the ring does not come round; with 40 it does.
#include <cuda/ptx>

#include <cstdio>
#include <cstdlib>

namespace ptx = cuda::ptx;
using Barrier = cuda::std::uint64_t;

constexpr int kStages = 8, kTileBytes = 128, kWarps = 8;

enum Form {
  kTileAStage,             // lane 0 arrives for its warp, behind __syncwarp
  kOneBarrier,             // four tiles a stage, one barrier, lane 0 of each warp arrives
  kBarrierATile,           // four barriers
  kAllLanes,               // one barrier, all lanes arrive
  kBarrierATileCopyATile,  // four barriers, each waited for just before the copy of its tile
  kBarrierATileAllLanes,
  kFourLanesWait,          // four barriers, four lanes wait, one copies
  kOneBarrierCopyATile,
  kTeamMeetsFirst,         // the four warps meet at a named barrier, then one lane arrives
};

__device__ __forceinline__ void copy(void* to, const void* from, unsigned bytes, Barrier* barrier) {
  asm volatile("cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(to))),
               "l"(from), "r"(bytes), "r"(static_cast<unsigned>(__cvta_generic_to_shared(barrier)))
               : "memory");
}
__device__ __forceinline__ void wait(Barrier* barrier, unsigned parity) {
  while (!ptx::mbarrier_try_wait_parity(barrier, parity)) {
  }
}

template <Form kForm>
__global__ void ring(const unsigned* in, unsigned* out, int stages) {
  constexpr int kTiles = kForm == kTileAStage ? 1 : 4, kTeams = kWarps / kTiles, kStageBytes = kTiles * kTileBytes;
  constexpr bool kShared = kForm == kOneBarrier || kForm == kAllLanes || kForm == kOneBarrierCopyATile || kForm == kTeamMeetsFirst;
  constexpr bool kEveryLane = kForm == kAllLanes || kForm == kBarrierATileAllLanes;
  constexpr bool kCopyATile = kForm == kBarrierATileCopyATile || kForm == kOneBarrierCopyATile;
  constexpr int kEmpty = kShared || kForm == kTileAStage ? 1 : 4;  // barriers a stage
  constexpr int kArrivals = (kForm == kTeamMeetsFirst || !kShared ? 1 : 4) * (kEveryLane ? 32 : 1);
  extern __shared__ __align__(128) char memory[];
  __shared__ Barrier full[kStages], empty[kStages][4];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; stage++) {
      ptx::mbarrier_init(&full[stage], 1);
      for (Barrier& barrier : empty[stage]) ptx::mbarrier_init(&barrier, kArrivals);
    }
    ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
  }
  __syncthreads();
  if (warp == kWarps) {
    if (lane >= (kForm == kFourLanesWait ? 4 : 1)) return;
    unsigned parity = 0;
    for (int i = 0, stage = 0; i < stages; i++) {
      const char* from = reinterpret_cast<const char*>(in) + i * kStageBytes;
      char* to = memory + stage * kStageBytes;
      const auto announce = [&] {
        ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, &full[stage], kStageBytes);
      };
      if constexpr (kCopyATile) {
        for (int tile = 0; tile < kTiles; tile++) {
          if (tile < kEmpty) wait(&empty[stage][tile], parity ^ 1);
          if (tile == 0) announce();
          copy(to + tile * kTileBytes, from + tile * kTileBytes, kTileBytes, &full[stage]);
        }
      } else {
        if constexpr (kForm == kFourLanesWait) {
          wait(&empty[stage][lane], parity ^ 1);
          __syncwarp(0xf);
        } else {
          for (int barrier = 0; barrier < kEmpty; barrier++) wait(&empty[stage][barrier], parity ^ 1);
        }
        if (lane == 0) announce(), copy(to, from, kStageBytes, &full[stage]);
        if constexpr (kForm == kFourLanesWait) __syncwarp(0xf);
      }
      if (++stage == kStages) stage = 0, parity ^= 1;
    }
    return;
  }
  unsigned parity = 0, sum = 0;
  const int tile = warp % kTiles;
  int stage = warp / kTiles;
  for (int i = warp / kTiles; i < stages; i += kTeams) {
    wait(&full[stage], parity);
    sum += reinterpret_cast<const unsigned*>(memory + (stage * kTiles + tile) * kTileBytes)[lane];
    Barrier* mine = &empty[stage][kEmpty == 1 ? 0 : tile];
    if constexpr (kEveryLane) {
      ptx::mbarrier_arrive(mine);
    } else {
      __syncwarp();
      if constexpr (kForm == kTeamMeetsFirst) asm volatile("bar.sync %0, 128;" ::"r"(1 + warp / 4) : "memory");
      if (lane == 0 && (kForm != kTeamMeetsFirst || tile == 0)) ptx::mbarrier_arrive(mine);
    }
    stage += kTeams;
    if (stage >= kStages) stage -= kStages, parity ^= 1;
  }
  out[blockIdx.x * kWarps * 32 + threadIdx.x] = sum;
}

template <int kForm>
int run(int form, int stages) {
  if constexpr (kForm > kTeamMeetsFirst) {
    std::fprintf(stderr, "form is %d; it must be from 0 to %d\n", form, kTeamMeetsFirst);
    return 2;
  } else {
    if (form != kForm) return run<kForm + 1>(form, stages);
    constexpr int kStageBytes = (kForm == kTileAStage ? 1 : 4) * kTileBytes, kCtas = 2;
    unsigned *in, *out, sums[kCtas * kWarps * 32];
    cudaMalloc(&in, stages * kStageBytes);
    cudaMemset(in, 1, stages * kStageBytes);
    cudaMalloc(&out, sizeof sums);
    ring<static_cast<Form>(kForm)><<<kCtas, kWarps * 32 + 32, kStages * kStageBytes>>>(in, out, stages);
    cudaMemcpy(sums, out, sizeof sums, cudaMemcpyDeviceToHost);
    std::printf("form %d: %s, a lane's sum %x\n", form, cudaGetErrorString(cudaGetLastError()), sums[5]);
    return 0;
  }
}

int main(int count, char** arguments) {
  if (count != 3) return std::fprintf(stderr, "usage: racecheck FORM STAGES\n"), 2;
  return run<0>(std::atoi(arguments[1]), std::atoi(arguments[2]));
}
