// Whether one of a cluster's two CTAs should fetch a vector for both: h, attention's output and the like, which every CTA reads whole
// behind a wait, while its weights stream. How long a CTA waits for such a vector from the L2, and what the stream does meanwhile, three
// ways: four warps load it and store it to shared memory; one lane has it copied in bulk; the two CTAs have half of it copied in bulk
// each, to both (multicast), when both have told that they are done with the vector before.
//   nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -o multicast multicast.cu && ./multicast
#include <algorithm>
#include <vector>

#include "stream.cuh"

constexpr int kWarps = 8, kReaders = 4, kStage = 8192, kStages = 16, kVectors = 8, kMostShared = 65536;
constexpr int kThreads = (kWarps + 1 + kReaders) * 32;
enum Way { kLoads, kBulk, kMulticast };
const char* const kWays[] = {"loads", "bulk copy", "multicast"};

__device__ void arrive_at(uint64_t* b, int rank) {  // of the CTA of that rank in the cluster
  asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\nmbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n}" ::"r"(address(b)), "r"(rank) : "memory");
}
__device__ void wait_in_cluster(uint64_t* b, uint32_t parity) {
  uint32_t met;
  do {
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(met) : "r"(address(b)), "r"(parity) : "memory");
  } while (!met);
}
__device__ void copy_to_both(void* to, const void* from, uint32_t n, uint64_t* b) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;" ::"r"(address(to)), "l"(from), "r"(n), "r"(address(b)), "h"(static_cast<uint16_t>(3)) : "memory");
}
__device__ uint32_t rank_in_cluster() {
  uint32_t rank;
  asm("mov.u32 %0, %cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ void cluster_sync() { asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory"); }
__device__ void readers_sync() { asm volatile("barrier.sync 1, %0;" ::"n"(kReaders * 32) : "memory"); }

// `waits` [CTAs]: a CTA's clocks from where it wants a vector to where it has it, over all of them. `sums`: of all words of the vectors, as read from
// shared memory.
template <Way kWay>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(kThreads, 1)
    stream(const char* data, long all, int window, const char* vectors, int shared, int fetches, unsigned long long* waits, unsigned* sums, unsigned* out) {
  extern __shared__ __align__(128) char memory[];
  char* const vector = memory + kStage * kStages;
  __shared__ uint64_t full[kStages], empty[kStages], fetched, both_done;
  __shared__ volatile long progress;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; s++) init(&full[s]), init(&empty[s]);
    init(&fetched), init(&both_done, 2);
    progress = 0;
  }
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  cluster_sync();
  const long first = all * blockIdx.x / gridDim.x, count = all * (blockIdx.x + 1) / gridDim.x - first;
  unsigned word = 0;
  if (warp == kWarps) {
    if (lane == 0) produce<kStage, kStages>(memory, full, empty, data + first * kStage, count, window);
  } else if (warp < kWarps) {
    word = fold<kStage, kStages, kWarps>(memory, full, empty, count, warp, lane, progress);
  } else {
    const int thread = threadIdx.x - (kWarps + 1) * 32;
    const uint32_t rank = rank_in_cluster();
    unsigned long long waited = 0;
    unsigned sum = 0;
    for (int turn = 0; turn < fetches; turn++) {
      while (progress < count * (turn + 1) / (fetches + 1)) __nanosleep(100);
      readers_sync();
      const char* from = vectors + turn % kVectors * kMostShared;
      const long long begin = clock64();
      if (kWay == kLoads) {
        uint4 quads[4];
        for (int at = thread; at < shared / 16; at += 4 * kReaders * 32) {
#pragma unroll
          for (int k = 0; k < 4; k++) {
            if (at + k * kReaders * 32 < shared / 16) quads[k] = __ldcg(reinterpret_cast<const uint4*>(from) + at + k * kReaders * 32);
          }
#pragma unroll
          for (int k = 0; k < 4; k++) {
            if (at + k * kReaders * 32 < shared / 16) reinterpret_cast<uint4*>(vector)[at + k * kReaders * 32] = quads[k];
          }
        }
        readers_sync();
      } else if (kWay == kBulk) {
        if (thread == 0) {
          expect(&fetched, shared);
          copy(vector, from, shared, &fetched, kEvictLast);
        }
        wait_in_cluster(&fetched, turn & 1);
      } else {
        if (thread == 0) {
          expect(&fetched, shared);  // ahead of telling: what arrives is expected
          arrive_at(&both_done, 0), arrive_at(&both_done, 1);
          wait_in_cluster(&both_done, turn & 1);
          copy_to_both(vector + rank * (shared / 2), from + rank * (shared / 2), shared / 2, &fetched);
        }
        wait_in_cluster(&fetched, turn & 1);
      }
      if (thread == 0) waited += clock64() - begin;
      for (int at = thread; at < shared / 16; at += kReaders * 32) {
        const uint4 quad = reinterpret_cast<const uint4*>(vector)[at];
        sum += quad.x + quad.y + quad.z + quad.w;
      }
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      readers_sync();
    }
    atomicAdd(&sums[blockIdx.x], sum);
    if (thread == 0) waits[blockIdx.x] = waited;
  }
  if (word == 0x12345) out[0] = word;  // never, but the compiler does not know
  cluster_sync();  // nobody leaves while the other one may still write to it
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

template <Way kWay>
void measure(const char* data, size_t bytes, const char* vectors, const std::vector<uint32_t>& words, int shared, int fetches, int ctas) {
  auto* kernel = stream<kWay>;
  const int room = kStage * kStages + kMostShared;
  CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, room));
  unsigned long long* waits;
  unsigned *sums, *out;
  CHECK(cudaMallocManaged(&waits, ctas * sizeof(*waits)));
  CHECK(cudaMallocManaged(&sums, ctas * sizeof(*sums)));
  CHECK(cudaMalloc(&out, sizeof(*out)));
  uint32_t expected = 0;
  for (int turn = 0; turn < fetches; turn++) {
    for (int i = 0; i < shared / 4; i++) expected += words[turn % kVectors * (kMostShared / 4) + i];
  }
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  const long stages = bytes / kStage;
  std::vector<double> times, clocks;
  for (int i = 0; i < 7; i++) {
    CHECK(cudaMemset(sums, 0, ctas * sizeof(*sums)));
    CHECK(cudaEventRecord(begin));
    kernel<<<ctas, kThreads, room>>>(data, stages, 65536 / kStage, vectors, shared, fetches, waits, sums, out);
    CHECK(cudaGetLastError());
    CHECK(cudaEventRecord(end));
    CHECK(cudaEventSynchronize(end));
    float ms;
    CHECK(cudaEventElapsedTime(&ms, begin, end));
    for (int cta = 0; cta < ctas; cta++) {
      if (sums[cta] != expected) printf("CTA %d has another sum\n", cta), exit(1);
      if (i > 1) clocks.push_back(static_cast<double>(waits[cta]) / fetches);
    }
    if (i > 1) times.push_back(ms);
  }
  std::sort(clocks.begin(), clocks.end());
  printf("%6d bytes by %-9s: %5.0f clocks in the median CTA, %5.0f at the 90th percentile; stream %.3f TB/s\n", shared, kWays[kWay], clocks[clocks.size() / 2],
         clocks[clocks.size() * 9 / 10], bytes / median(times) / 1e9);
  CHECK(cudaFree(waits));
  CHECK(cudaFree(sums));
  CHECK(cudaFree(out));
}

int main() {
  const size_t bytes = 3000000000ull / kStage * kStage;
  char *data, *vectors;
  CHECK(cudaMalloc(&data, bytes));
  CHECK(cudaMalloc(&vectors, kVectors * kMostShared));
  fill<<<2048, 256>>>(reinterpret_cast<uint4*>(data), bytes / 16);
  fill<<<2048, 256>>>(reinterpret_cast<uint4*>(vectors), kVectors * kMostShared / 16);
  std::vector<uint32_t> words(kVectors * kMostShared / 4);
  CHECK(cudaMemcpy(words.data(), vectors, kVectors * kMostShared, cudaMemcpyDeviceToHost));
  int ctas;
  CHECK(cudaDeviceGetAttribute(&ctas, cudaDevAttrMultiProcessorCount, 0));
  ctas = ctas / 2 * 2;
  for (int shared : {8192, 16384, 32768, 65536}) {
    measure<kLoads>(data, bytes, vectors, words, shared, 200, ctas);
    measure<kBulk>(data, bytes, vectors, words, shared, 200, ctas);
    measure<kMulticast>(data, bytes, vectors, words, shared, 200, ctas);
  }
}
