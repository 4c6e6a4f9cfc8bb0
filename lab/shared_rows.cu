// What multiplying rows of weights by a vector costs beside the stream that brings them: time, and power. A laboratory tool; rows are of 4096
// elements, as those of Pythia-6.9B and LLaMA 8B.
//
//     nvcc -O3 -std=c++17 -arch=sm_90a -I src/clusterfusion/cuda -o shared_rows lab/shared_rows.cu && python3 lab/power.py ./shared_rows
//
// A form is how many warps there are, how many share a row, each with its piece of the columns, what they do with it, and where they have x:
//   none       stages are handed back unread
//   read       and read
//   multiply   and multiplied by x, in fp32 in shared memory. A warp alone reads x once a row, 16 KB for 8 KB of weights; warps that share
//              rows take four at a time, and read x once for the four
//   keep       the same, with x in registers
//   tensor     all warps share eight rows, lane 4g + t has 16 bytes of row g of each of two blocks of 32 columns: rows g and g + 8 of a product's first
//              operand. Columns 0 to 2 of the second one are x at the first block as three fp16 numbers, columns 3 to 5 at the second one. Lanes of odd g
//              take the blocks in the other order, since rows lie a multiple of 128 bytes apart, and use the other columns' sums.
// Every so many rows (a phase) all warps wait, with what they hold, as a decode step waits for its vectors; the ring fills meanwhile.
// Rows are in ranges, each CTA's own, or dealt one by one.
// At the end of each form it reads for 0.6 s and rests before it does again: such a burst is over before the power cap lowers the clocks.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "ops/gemv.cuh"
#include "ops/ring.cuh"

using namespace clusterfusion;

#define CHECK(call) do { cudaError_t e = (call); if (e != cudaSuccess) { printf("%d: %s\n", __LINE__, cudaGetErrorString(e)); exit(1); } } while (0)

enum Work { kNone, kRead, kMultiply, kKeep, kTensor };
constexpr const char* kNames[] = {"none", "read", "multiply", "keep", "tensor"};
constexpr int kColumns = 4096, kRowBytes = kColumns * 2, kStages = 20, kWindow = 7;  // a phase begins with the first warp: 2 * 7 - 1 rows at most from a warp to its next, and a window
constexpr int kMostTurn = 8;                                                           // rows that warps take together
__host__ __device__ constexpr int others(int warps) { return warps == 4 ? 8 : 15 - warps; }  // warps that take registers and sleep, but for one lane

struct Arguments {
  const char* weights;
  const float* x;
  float* out;
  int rows, phase, pause;  // rows of all CTAs; of a CTA between two waits; clocks
  bool dealt;              // one by one, so that what CTAs read at the same time lies together; else each has its own range
};

template <int kWarps>
struct Shared {
  alignas(128) char stages[kStages * kRowBytes];
  alignas(128) float x[kColumns];
  alignas(128) char terms[3][kColumns * 2 + 64];
  cuda::std::uint64_t full[kStages], empty[kStages], done, go;
  float pieces[kWarps == 8 ? 2 : 1][4][kMostTurn][kWarps];  // of a team's turn and the one before: row, piece
};

// As ops/ring.cuh has them: stage `row` % kStages, for the `row`th time.
struct Place {
  int stage, parity;
  __device__ explicit Place(int row) : stage(row % kStages), parity(row / kStages & 1) {}
};

__device__ void mma_16x8x16(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

template <int kWarps, int kTeam, Work kWork>
__global__ void __launch_bounds__((kWarps + 1 + others(kWarps)) * kWarpSize, 1) multiply(const Arguments a) {
  extern __shared__ __align__(128) char memory[];
  auto& s = *reinterpret_cast<Shared<kWarps>*>(memory);
  constexpr int kTeams = kWarps / kTeam, kTurn = kTeam == 1 ? 1 : kWork == kTensor ? 8 : 4;
  constexpr int kPieceBytes = kRowBytes / kTeam, kSteps = kPieceBytes / 16 / kWarpSize;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int first = a.dealt ? blockIdx.x : static_cast<long long>(a.rows) * blockIdx.x / gridDim.x, step = a.dealt ? gridDim.x : 1;
  const int rows = a.dealt ? (a.rows - first + step - 1) / step : static_cast<long long>(a.rows) * (blockIdx.x + 1) / gridDim.x - first;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; i++) mbarrier_init(&s.full[i], 1), mbarrier_init(&s.empty[i], kTeam * kWarpSize);
    mbarrier_init(&s.done, kWarps * kWarpSize), mbarrier_init(&s.go, 1);
    mbarrier_init_fence();
  }
  const SplitVector x{reinterpret_cast<float4*>(s.x), reinterpret_cast<float4*>(s.x) + kColumns / 8};
  for (int i = threadIdx.x; i < kColumns / 4; i += blockDim.x) x.quad(i) = reinterpret_cast<const float4*>(a.x)[i];
  __syncthreads();
  for (int i = threadIdx.x; i < kColumns; i += blockDim.x) {
    float left = a.x[i];
    for (int term = 0; term < 3; term++, left *= 2048) {
      const __half value = __float2half(left);
      reinterpret_cast<__half*>(s.terms[term])[i] = value;
      left -= __half2float(value);
    }
  }
  __syncthreads();
  if (warp == kWarps) {  // the producer
    if (lane != 0) return;
    const SharedAddress stages = shared_address(s.stages), full = shared_address(s.full), empty = shared_address(s.empty);
    const char* from = a.weights + static_cast<long long>(first) * kRowBytes;
    for (int row = 0; row < rows; row++, from += step * kRowBytes) {
      const Place at(row);
      mbarrier_wait_local(empty + at.stage * 8, at.parity ^ 1);
      if (row >= kWindow) mbarrier_wait_local(full + Place(row - kWindow).stage * 8, Place(row - kWindow).parity);
      mbarrier_arrive_expect(full + at.stage * 8, kRowBytes);
      bulk_copy(stages + at.stage * kRowBytes, from, kRowBytes, full + at.stage * 8);
    }
    return;
  }
  if (warp > kWarps) {  // who makes the vectors
    if (warp > kWarps + 1 || lane != 0) return;
    for (int phase = 0; phase * a.phase < rows; phase++) {
      if (phase > 0) mbarrier_wait_local(&s.done, (phase - 1) & 1);
      const long long start = clock64();
      while (clock64() - start < a.pause) __nanosleep(50);
      mbarrier_arrive_local(&s.go);
    }
    return;
  }
  const int team = warp / kTeam, piece = warp % kTeam;
  int turns = 0;
  unsigned seen = 0;
  for (int phase = 0; phase * a.phase < rows; phase++) {
    const int begin = phase * a.phase, end = min(rows, begin + a.phase);
    float kept[kSteps][kVector];
    bool ready = false;
    const auto make_ready = [&] {
      if (ready) return;
      ready = true;
      mbarrier_wait_local(&s.go, phase & 1);
      if constexpr (kWork == kKeep) {
#pragma unroll
        for (int i = 0; i < kSteps; i++) x.get((piece * kSteps + i) * kWarpSize + lane).unpack(kept[i]);
      }
    };
    if constexpr (kWork == kTensor) {
      static_assert(kTeam == kWarps, "all warps take all rows");
      constexpr int kPairs = kColumns / 64 / kWarps;
      const int group = lane / 4, odd = group & 1, quad = lane % 4;
      for (int base = begin; base < end; base += 8, turns++) {
        const int mine = base + group;
        const bool there = mine < end;
        const Place at(mine);
        uint4 held[2 * kPairs] = {};
        StageReads reads;
        if (there) {
          mbarrier_wait_local(&s.full[at.stage], at.parity);
          const uint4* data = reinterpret_cast<const uint4*>(s.stages + at.stage * kRowBytes) + warp * kPairs * 8 + quad;
#pragma unroll
          for (int i = 0; i < kPairs; i++) {
            held[2 * i] = data[i * 8 + odd * 4];
            held[2 * i + 1] = data[i * 8 + (odd ^ 1) * 4];
            reads.saw(held[2 * i].x), reads.saw(held[2 * i + 1].x);
          }
          reads.wait();
          asm volatile("mbarrier.arrive.shared.b64 _, [%0], 8;" ::"r"(shared_address(&s.empty[at.stage])) : "memory");
        }
        __syncwarp();
        make_ready();
        __syncwarp();
        float sums[2][4] = {};
        const char* terms = s.terms[group % 3] + (group / 3 & 1) * 64 + quad * 16 + warp * kPairs * 128;
#pragma unroll
        for (int i = 0; i < kPairs; i++) {
          uint4 b = {};
          if (group < 6) b = *reinterpret_cast<const uint4*>(terms + i * 128);
          mma_16x8x16(sums[0], held[2 * i].x, held[2 * i + 1].x, held[2 * i].y, held[2 * i + 1].y, b.x, b.y);
          mma_16x8x16(sums[1], held[2 * i].z, held[2 * i + 1].z, held[2 * i].w, held[2 * i + 1].w, b.z, b.w);
        }
        // Columns 2 quad and 2 quad + 1 of rows group and group + 8; those of the first block are 0 to 2, of the second one 3 to 5.
        constexpr float k1 = 1.0f / 2048, k2 = k1 * k1;
        const float f0 = sums[0][0] + sums[1][0], f1 = sums[0][1] + sums[1][1], s0 = sums[0][2] + sums[1][2], s1 = sums[0][3] + sums[1][3];
        const float a0 = odd ? s0 : f0, a1 = odd ? s1 : f1, b0 = odd ? f0 : s0, b1 = odd ? f1 : s1;  // a: with the first block
        float total = quad == 0 ? a0 + a1 * k1 : quad == 1 ? a0 * k2 + b1 : quad == 2 ? b0 * k1 + b1 * k2 : 0.0f;
        total += __shfl_xor_sync(kAllLanes, total, 1);
        total += __shfl_xor_sync(kAllLanes, total, 2);
        if (quad == 0) s.pieces[0][turns % 4][group][warp] = total;
        if (turns % kWarps == warp) {
          asm volatile("barrier.sync %0, %1;" ::"r"(1 + turns % 4), "n"(kWarps * kWarpSize) : "memory");
          if (lane < 8 && base + lane < end) {
            float sum = 0;
#pragma unroll
            for (int i = 0; i < kWarps; i++) sum += s.pieces[0][turns % 4][lane][i];
            a.out[first + (base + lane) * step] = sum;
          }
        } else {
          asm volatile("barrier.arrive %0, %1;" ::"r"(1 + turns % 4), "n"(kWarps * kWarpSize) : "memory");
        }
      }
      make_ready();
      mbarrier_arrive_local(&s.done);
      continue;
    }
    for (int base = begin + team * kTurn; kWork != kTensor && base < end; base += kTeams * kTurn, turns++) {
      uint4 held[kTurn * kSteps];
#pragma unroll
      for (int r = 0; r < kTurn; r++) {
        if (base + r >= end) break;
        StageReads reads;
        const Place at(base + r);
        mbarrier_wait_local(&s.full[at.stage], at.parity);
        const uint4* data = reinterpret_cast<const uint4*>(s.stages + at.stage * kRowBytes + piece * kPieceBytes);
        if constexpr (kWork != kNone) {
#pragma unroll
          for (int i = 0; i < kSteps; i++) {
            held[r * kSteps + i] = data[i * kWarpSize + lane];
            reads.saw(held[r * kSteps + i].x);
            if constexpr (kWork == kRead) seen ^= held[r * kSteps + i].x ^ held[r * kSteps + i].y ^ held[r * kSteps + i].z ^ held[r * kSteps + i].w;
          }
        }
        reads.wait();
        mbarrier_arrive_local(&s.empty[at.stage]);
      }
      make_ready();
      if constexpr (kWork == kMultiply || kWork == kKeep) {
        LaneSum sums[kTurn];
#pragma unroll
        for (int i = 0; i < kSteps; i++) {
          float v[kVector];
          if constexpr (kWork == kKeep) {
#pragma unroll
            for (int k = 0; k < kVector; k++) v[k] = kept[i][k];
          } else {
            x.get((piece * kSteps + i) * kWarpSize + lane).unpack(v);
          }
#pragma unroll
          for (int r = 0; r < kTurn; r++) {
            float w[kVector];
            unpack8<__half>(held[r * kSteps + i], w);
            sums[r].add(w, v);
          }
        }
        float totals[kTurn];
#pragma unroll
        for (int r = 0; r < kTurn; r++) totals[r] = sums[r].total();
        const float total = warp_sums(totals, lane);
        if constexpr (kTeam == 1) {
          if (lane == 0) a.out[first + base * step] = total;
        } else {
          if (lane % (kWarpSize / kTurn) == 0) s.pieces[team][turns % 4][lane / (kWarpSize / kTurn)][piece] = total;
          asm volatile("barrier.sync %0, %1;" ::"r"(1 + team), "n"(kTeam * kWarpSize) : "memory");
          if (turns % kTeam == piece && lane < kTurn && base + lane < end) {
            float sum = 0;
#pragma unroll
            for (int i = 0; i < kTeam; i++) sum += s.pieces[team][turns % 4][lane][i];
            a.out[first + (base + lane) * step] = sum;
          }
        }
      }
    }
    make_ready();
    mbarrier_arrive_local(&s.done);
  }
  if (kWork == kRead && seen == 12345) a.out[0] = 1;
}

struct Device {
  const char* weights;
  const float* x;
  float* out;
  int ctas;
};

double now() { return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count(); }

template <int kWarps, int kTeam, Work kWork>
void measure(const Device& d, int rows, const std::vector<__half>& weights, const std::vector<float>& x, bool dealt = false) {
  const auto kernel = multiply<kWarps, kTeam, kWork>;
  CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared<kWarps>)));
  const auto launch = [&](int phase, int pause) {
    kernel<<<d.ctas, (kWarps + 1 + others(kWarps)) * kWarpSize, sizeof(Shared<kWarps>)>>>({d.weights, d.x, d.out, rows, phase, pause, dealt});
  };
  CHECK(cudaMemset(d.out, 0xff, rows * sizeof(float)));
  launch(48, 1000);
  CHECK(cudaDeviceSynchronize());
  std::vector<float> out(rows);
  CHECK(cudaMemcpy(out.data(), d.out, rows * sizeof(float), cudaMemcpyDeviceToHost));
  double worst = 0;
  const int known = weights.size() / kColumns;  // rows repeat
  for (int row = 0; row < rows && kWork >= kMultiply; row += row < 4096 ? 1 : 997) {
    double sum = 0, size = 0;
    for (int i = 0; i < kColumns; i++) {
      const double term = static_cast<double>(__half2float(weights[static_cast<size_t>(row % known) * kColumns + i])) * x[i];
      sum += term, size += std::fabs(term);
    }
    worst = std::max(worst, std::isnan(out[row]) ? 1e9 : std::fabs(out[row] - sum) / size);
  }
  const char* how = dealt ? "dealt one by one" : "in ranges";
  printf("%s, %d warps, %d share a row, %s: error %.2g of the sum of sizes\n", kNames[kWork], kWarps, kTeam, how, worst);
  cudaEvent_t start, end;
  CHECK(cudaEventCreate(&start));
  CHECK(cudaEventCreate(&end));
  for (const int phase : {1 << 30, 368, 48, 32}) {
    for (const int pause : {0, 10000}) {
      if (phase == 1 << 30 && pause) continue;
      std::vector<float> times;
      for (int i = 0; i < 15; i++) {
        CHECK(cudaEventRecord(start));
        launch(phase, pause);
        CHECK(cudaEventRecord(end));
        CHECK(cudaEventSynchronize(end));
        float ms;
        CHECK(cudaEventElapsedTime(&ms, start, end));
        times.push_back(ms);
      }
      std::sort(times.begin(), times.end());
      const double ms = times[times.size() / 2], bytes = static_cast<double>(rows) * kRowBytes;
      printf("  a wait of %5d clocks every %10d rows: %.4f ms, %.3f TB/s\n", pause, phase, ms, bytes / ms / 1e9);
    }
  }
  for (int burst = 0; burst < 3; burst++) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1200));
    const double began = now();
    double ended = began;
    int launches = 0;
    while (ended - began < 0.6) {
      for (int i = 0; i < 20; i++, launches++) launch(1 << 30, 0);
      CHECK(cudaDeviceSynchronize());
      ended = now();
    }
    printf("burst %.3f %.3f %.4f TB/s %s, %d warps, %d share a row, %s\n", began, ended,
           static_cast<double>(rows) * kRowBytes * launches / (ended - began) / 1e12, kNames[kWork], kWarps, kTeam, how);
  }
}

int main() {
  const int rows = 132 * 48 * 80, known = 4096;
  Device d{};
  cudaDeviceProp properties;
  CHECK(cudaGetDeviceProperties(&properties, 0));
  d.ctas = properties.multiProcessorCount / 2 * 2;
  srand(1);
  const auto random = [] { return static_cast<float>(rand()) / RAND_MAX - 0.5f; };
  std::vector<__half> weights(static_cast<size_t>(known) * kColumns);
  std::vector<float> x(kColumns);
  for (__half& w : weights) w = __float2half(random());
  for (float& v : x) v = 4 * random();
  char* memory;
  float *on_device, *out;
  CHECK(cudaMalloc(&memory, static_cast<size_t>(rows) * kRowBytes));
  CHECK(cudaMalloc(&on_device, kColumns * sizeof(float)));
  CHECK(cudaMalloc(&out, rows * sizeof(float)));
  for (int row = 0; row < rows; row += known) {
    const size_t count = std::min(known, rows - row);
    CHECK(cudaMemcpy(memory + static_cast<size_t>(row) * kRowBytes, weights.data(), count * kRowBytes, cudaMemcpyHostToDevice));
  }
  CHECK(cudaMemcpy(on_device, x.data(), kColumns * sizeof(float), cudaMemcpyHostToDevice));
  d.weights = memory, d.x = on_device, d.out = out;
  measure<7, 1, kNone>(d, rows, weights, x);
  measure<7, 1, kNone>(d, rows, weights, x, true);
  measure<7, 1, kRead>(d, rows, weights, x);
  measure<7, 1, kMultiply>(d, rows, weights, x);
  measure<7, 1, kMultiply>(d, rows, weights, x, true);
  measure<8, 4, kMultiply>(d, rows, weights, x);
  measure<8, 4, kKeep>(d, rows, weights, x);
  measure<8, 8, kTensor>(d, rows, weights, x);
}
