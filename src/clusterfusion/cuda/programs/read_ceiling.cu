// read_ceiling: reads a buffer once, as fast as this GPU can, and folds it into one word a CTA. What a decode step, which
// has to read its weights, cannot beat. Host twin: jit/read_ceiling.py.
//
// Two ways, since neither is the faster one on every GPU: bulk copies through a ring, as the decoder layer reads, and plain
// loads. Both fold by XOR, which costs an instruction a word and cannot be left out: the words say that all was read.
#include <cuda/std/cstdint>

#include "ops/ring.cuh"
#include "primitives/bulk_copy.cuh"
#include "primitives/mbarrier.cuh"
#include "primitives/named_barrier.cuh"

namespace clusterfusion {

constexpr int kConsumerBarrier = 1;
constexpr int kLoadThreads = 512;
constexpr int kLoadCtas = 2;           // an SM; one is 3% slower on an H200, more are no faster
constexpr int kLoadsInFlight = 8;      // a thread
constexpr int kStageBytesRead = 8192;  // of the ring; with 4 KB the producer lane is the limit

// data: `bytes` of them, both multiples of 16, as bulk copies need. words: one a CTA.
struct ReadArguments {
  const void* data;
  cuda::std::int64_t bytes;
  unsigned* words;
};

__device__ __forceinline__ unsigned fold(uint4 v) { return v.x ^ v.y ^ v.z ^ v.w; }

// The XOR of `word` over kWarps warps, in their thread 0. `wait` is a barrier of just these warps.
template <int kWarps, typename Wait>
__device__ __forceinline__ unsigned fold_warps(unsigned word, unsigned* warp_words, Wait wait) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  word = __reduce_xor_sync(kAllLanes, word);
  if (lane == 0) warp_words[warp] = word;
  wait();
  word = 0;
  for (int i = 0; i < kWarps; i++) word ^= warp_words[i];
  return word;
}

template <int kWarps>
struct WaitConsumers {
  __device__ __forceinline__ void operator()() const { named_barrier_sync<kConsumerBarrier, kWarps * kWarpSize>(); }
};

struct WaitCta {
  __device__ __forceinline__ void operator()() const { __syncthreads(); }
};

// Grid: a CTA an SM; kWarps consumer warps and one producer warp. CTA c of G takes tiles [c T / G, (c + 1) T / G) of T, a
// tile a stage. Dynamic shared memory: the ring's stages. The window is the whole ring: nobody waits for a message here.
template <int kStages, int kWarps>
__global__ void __launch_bounds__((kWarps + 1) * kWarpSize, 1) read_by_bulk_copies(const __grid_constant__ ReadArguments a) {
  using RingType = Ring<kStages, kStageBytesRead, 1, kWarps, kStages>;
  using cuda::std::int64_t;
  extern __shared__ __align__(128) char stages[];
  __shared__ typename RingType::Barriers barriers;
  __shared__ unsigned warp_words[kWarps];
  if (threadIdx.x == 0) {
    RingType::init(barriers);
    mbarrier_init_fence();
  }
  __syncthreads();
  const int64_t tiles = (a.bytes + kStageBytesRead - 1) / kStageBytesRead;
  const int64_t first = tiles * blockIdx.x / gridDim.x, last = tiles * (blockIdx.x + 1) / gridDim.x;
  const auto bytes_of = [&](int64_t tile) {
    const int64_t left = a.bytes - tile * kStageBytesRead;
    return left < kStageBytesRead ? static_cast<unsigned>(left) : static_cast<unsigned>(kStageBytesRead);
  };
  if (threadIdx.x >= kWarps * kWarpSize) {
    if (threadIdx.x > kWarps * kWarpSize) return;
    RingProducer<RingType> ring(stages, barriers);
    const char* source = static_cast<const char*>(a.data) + first * kStageBytesRead;
    for (int64_t tile = first; tile < last; tile++, source += kStageBytesRead) {
      const unsigned bytes = bytes_of(tile);
      ring.copy(ring.begin(bytes), source, bytes);
      ring.end();
    }
    return;
  }
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  RingConsumer<RingType> ring(stages, barriers, warp);
  unsigned word = 0;
  ring.template tiles<kStageBytesRead>(static_cast<int>(last - first), [&](int tile, const char* data) {
    const uint4* vectors = reinterpret_cast<const uint4*>(data);
    const int count = bytes_of(first + tile) / sizeof(uint4);
    if (count == kStageBytesRead / sizeof(uint4)) {
#pragma unroll 8
      for (int i = 0; i < static_cast<int>(kStageBytesRead / sizeof(uint4)); i += kWarpSize) word ^= fold(vectors[i + lane]);
    } else {
      for (int i = lane; i < count; i += kWarpSize) word ^= fold(vectors[i]);
    }
    StageReads reads;
    reads.saw(word);
    reads.wait();
  });
  word = fold_warps<kWarps>(word, warp_words, WaitConsumers<kWarps>());
  if (threadIdx.x == 0) a.words[blockIdx.x] = word;
}

// Grid: kLoadCtas CTAs an SM. Thread t of N takes vectors t, t + N, t + 2 N, ….
__global__ void __launch_bounds__(kLoadThreads, kLoadCtas) read_by_loads(const __grid_constant__ ReadArguments a) {
  using cuda::std::int64_t;
  __shared__ unsigned warp_words[kLoadThreads / kWarpSize];
  const uint4* vectors = static_cast<const uint4*>(a.data);
  const int64_t count = a.bytes / sizeof(uint4), step = static_cast<int64_t>(gridDim.x) * kLoadThreads;
  int64_t at = static_cast<int64_t>(blockIdx.x) * kLoadThreads + threadIdx.x;
  unsigned word = 0;
  for (; at + (kLoadsInFlight - 1) * step < count; at += kLoadsInFlight * step) {
    uint4 loaded[kLoadsInFlight];
#pragma unroll
    for (int i = 0; i < kLoadsInFlight; i++) loaded[i] = __ldg(vectors + at + i * step);
#pragma unroll
    for (int i = 0; i < kLoadsInFlight; i++) word ^= fold(loaded[i]);
  }
  for (; at < count; at += step) word ^= fold(__ldg(vectors + at));
  word = fold_warps<kLoadThreads / kWarpSize>(word, warp_words, WaitCta());
  if (threadIdx.x == 0) a.words[blockIdx.x] = word;
}

}  // namespace clusterfusion
