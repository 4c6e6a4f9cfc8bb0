// What copy_size.cu and multicast.cu stream with: one producer lane that fills a ring of stages by bulk copies, with a window on those in flight, and
// warps that fold what comes; and random words to stream.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#define CHECK(call) do { cudaError_t e = (call); if (e != cudaSuccess) { printf("%d: %s\n", __LINE__, cudaGetErrorString(e)); exit(1); } } while (0)

constexpr uint64_t kEvictFirst = 0x12F0000000000000ull, kEvictLast = 0x14F0000000000000ull;

__device__ __forceinline__ uint32_t address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
__device__ __forceinline__ void init(uint64_t* b, int arrivals = 1) { asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(address(b)), "r"(arrivals)); }
__device__ __forceinline__ void expect(uint64_t* b, uint32_t n) { asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(address(b)), "r"(n) : "memory"); }
__device__ __forceinline__ void arrive(uint64_t* b) { asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(address(b)) : "memory"); }
__device__ __forceinline__ void wait(uint64_t* b, uint32_t parity) {
  uint32_t met;
  do {
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(met) : "r"(address(b)), "r"(parity) : "memory");
  } while (!met);
}
__device__ __forceinline__ void copy(void* to, const void* from, uint32_t n, uint64_t* b, uint64_t policy = kEvictFirst) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(address(to)), "l"(from), "r"(n), "r"(address(b)), "l"(policy) : "memory");
}

// The producer lane: `count` stages from `from` on, `window` of them in flight.
template <int kStage, int kStages>
__device__ __forceinline__ void produce(char* ring, uint64_t* full, uint64_t* empty, const char* from, long count, int window) {
  int stage = 0, parity = 1, landing = 0, landing_parity = 0;
  for (long i = 0; i < count; i++, from += kStage) {
    wait(&empty[stage], parity);
    if (i >= window) {
      wait(&full[landing], landing_parity);
      if (++landing == kStages) landing = 0, landing_parity ^= 1;
    }
    expect(&full[stage], kStage);
    copy(ring + stage * kStage, from, kStage, &full[stage]);
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
}

// One of kWarps warps: the XOR of its stages' words on this lane. Warp 0 says in `progress` how far it is.
template <int kStage, int kStages, int kWarps>
__device__ __forceinline__ unsigned fold(const char* ring, uint64_t* full, uint64_t* empty, long count, int warp, int lane, volatile long& progress) {
  unsigned word = 0;
  int stage = warp, parity = 0;
  for (long i = warp; i < count; i += kWarps) {
    wait(&full[stage], parity);
    const uint4* v = reinterpret_cast<const uint4*>(ring + stage * kStage);
#pragma unroll 4
    for (int j = lane; j < kStage / 16; j += 32) word ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
    __syncwarp();
    if (lane == 0) {
      arrive(&empty[stage]);
      if (warp == 0) progress = i;
    }
    stage += kWarps;
    if (stage >= kStages) stage -= kStages, parity ^= 1;
  }
  if (warp == 0 && lane == 0) progress = count;
  return word;
}

__global__ void fill(uint4* to, size_t count) {
  for (size_t i = blockIdx.x * 256ull + threadIdx.x; i < count; i += 2048 * 256ull) {
    uint32_t s = static_cast<uint32_t>(i * 2654435761u);
    s ^= s >> 15, s *= 0x846ca68b, s ^= s >> 13;
    to[i] = make_uint4(s, s * 747796405u, s ^ 0x9e3779b9, s * 2891336453u);
  }
}
