// What multiplying rows of weights by a vector costs beside the stream that brings them: time, bytes a microsecond when the ring is full, power
// and clocks. A laboratory tool; rows are of 4096 elements, as those of Pythia-6.9B and LLaMA 8B.
//
//     nvcc -O3 -std=c++17 -arch=sm_90a -I src/clusterfusion/cuda -o shared_rows lab/shared_rows.cu && ./shared_rows
//
// Four forms:
//   fma         a warp takes a row; x in fp32 in shared memory, read once a row: 16 KB for 8 KB of weights.
//   tensor      the same on the tensor cores. Lane 4g + t has 16 bytes of the row, and of x at the same columns: row g of the first operand is
//               what lanes 4g to 4g + 3 have of the row, column g of the second one what they have of x, once the nearest fp16 values and once
//               what is left of them. Of the products of rows and columns only those of the same g count. Rows 8 to 15 are a second row's.
//   shared      four warps take four rows, each a quarter of every row's columns: x is read once for four rows.
//   shared tensor
// Every so many rows (a phase) all warps wait, with what they hold, as a decode step waits for its vectors; the ring fills meanwhile.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "ops/gemv.cuh"
#include "ops/ring.cuh"

using namespace clusterfusion;

#define CHECK(call) do { cudaError_t e = (call); if (e != cudaSuccess) { printf("%d: %s\n", __LINE__, cudaGetErrorString(e)); exit(1); } } while (0)

enum Form { kFma, kTensor, kShared, kSharedTensor };
__host__ __device__ constexpr bool on_tensor_cores(Form form) { return form == kTensor || form == kSharedTensor; }
__host__ __device__ constexpr bool is_shared(Form form) { return form == kShared || form == kSharedTensor; }
constexpr int kColumns = 4096, kRowBytes = kColumns * 2, kStages = 20, kWindow = 7;
constexpr int kTurn = 4;  // rows, and warps that share them
__host__ __device__ constexpr int others(int warps) { return warps == 4 ? 8 : 15 - warps; }  // warps that take registers and sleep, but for one lane
constexpr int kPieceBytes = kRowBytes / kTurn, kSteps = kPieceBytes / 16 / kWarpSize;
constexpr int kLowAt = kRowBytes + 64;  // of x in fp16, what is left of it: in other banks than the nearest values

struct Arguments {
  const char* weights;
  const float* x;
  float* out;
  int rows, phase, pause;  // rows of all CTAs; of a CTA between two waits; clocks
};

template <int kWarps>
struct Shared {
  alignas(128) char stages[kStages * kRowBytes];
  alignas(128) char x[kColumns * 4 + 128];
  cuda::std::uint64_t full[kStages], empty[kStages], done, go;
  float pieces[2][2][kTurn][kTurn];  // of a team's turn and the one before: row, piece
};

// As ops/ring.cuh has them: stage `row` % kStages, for the `row`th time.
struct Place {
  int stage, parity;
  __device__ explicit Place(int row) : stage(row % kStages), parity(row / kStages & 1) {}
};

__device__ __forceinline__ void mma_16x8x16(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// sums += the products of two rows' 16 bytes a lane with x's.
__device__ __forceinline__ void add(float (&sums)[4], const uint4& row, const uint4& other, const uint4& nearest, const uint4& rest) {
  mma_16x8x16(sums, row.x, other.x, row.y, other.y, nearest.x, nearest.y);
  mma_16x8x16(sums, row.z, other.z, row.w, other.w, nearest.z, nearest.w);
  mma_16x8x16(sums, row.x, other.x, row.y, other.y, rest.x, rest.y);
  mma_16x8x16(sums, row.z, other.z, row.w, other.w, rest.z, rest.w);
}
// Of a row's two sums that a lane has, of columns 2t and 2t + 1 of row g: that of column g, or 0.
__device__ __forceinline__ float diagonal(float even, float odd, int lane) {
  const int group = lane / 4;
  return lane % 4 != group / 2 ? 0.0f : group % 2 == 0 ? even : odd;
}
__device__ __forceinline__ uint4 vector_of(const char* from, int index) { return reinterpret_cast<const uint4*>(from)[index]; }

template <Form kForm, int kWarps>
__global__ void __launch_bounds__((kWarps + 1 + others(kWarps)) * kWarpSize, 1) multiply(const Arguments a) {
  extern __shared__ __align__(128) char memory[];
  auto& s = *reinterpret_cast<Shared<kWarps>*>(memory);
  constexpr int kTeam = is_shared(kForm) ? kTurn : 1, kTeams = kWarps / kTeam;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int first = static_cast<long long>(a.rows) * blockIdx.x / gridDim.x;
  const int rows = static_cast<long long>(a.rows) * (blockIdx.x + 1) / gridDim.x - first;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; i++) mbarrier_init(&s.full[i], 1), mbarrier_init(&s.empty[i], kTeam * kWarpSize);
    mbarrier_init(&s.done, kWarps * kWarpSize), mbarrier_init(&s.go, 1);
    mbarrier_init_fence();
  }
  if (on_tensor_cores(kForm)) {
    for (int i = threadIdx.x; i < kColumns; i += blockDim.x) {
      const __half nearest = __float2half(a.x[i]);
      reinterpret_cast<__half*>(s.x)[i] = nearest;
      reinterpret_cast<__half*>(s.x + kLowAt)[i] = __float2half(a.x[i] - __half2float(nearest));
    }
  } else {
    const SplitVector x{reinterpret_cast<float4*>(s.x), reinterpret_cast<float4*>(s.x) + kColumns / 8};
    for (int i = threadIdx.x; i < kColumns / 4; i += blockDim.x) x.quad(i) = reinterpret_cast<const float4*>(a.x)[i];
  }
  __syncthreads();
  if (warp == kWarps) {  // the producer
    if (lane != 0) return;
    const SharedAddress stages = shared_address(s.stages), full = shared_address(s.full), empty = shared_address(s.empty);
    const char* from = a.weights + static_cast<long long>(first) * kRowBytes;
    for (int row = 0; row < rows; row++, from += kRowBytes) {
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
  for (int phase = 0; phase * a.phase < rows; phase++) {
    const int begin = phase * a.phase, end = min(rows, begin + a.phase);
    bool ready = false;
    const auto make_ready = [&] {
      if (!ready) mbarrier_wait_local(&s.go, phase & 1);
      ready = true;
    };
    if constexpr (!is_shared(kForm)) {
      const SplitVector x{reinterpret_cast<float4*>(s.x), reinterpret_cast<float4*>(s.x) + kColumns / 8};
      for (int row = begin + (warp - begin % kWarps + kWarps) % kWarps; row < end; row += kWarps) {
        constexpr int kVectors = kRowBytes / 16 / kWarpSize;
        uint4 held[kVectors];
        StageReads reads;
        const Place at(row);
        mbarrier_wait_local(&s.full[at.stage], at.parity);
#pragma unroll
        for (int i = 0; i < kVectors; i++) {
          held[i] = reinterpret_cast<const uint4*>(s.stages + at.stage * kRowBytes)[i * kWarpSize + lane];
          reads.saw(held[i].x);
        }
        reads.wait();
        mbarrier_arrive_local(&s.empty[at.stage]);
        make_ready();
        if (on_tensor_cores(kForm)) __syncwarp();  // a product takes the whole warp
        float total[1];
        if constexpr (kForm == kFma) {
          LaneSum sum;
#pragma unroll
          for (int i = 0; i < kVectors; i++) {
            float w[kVector], v[kVector];
            unpack8<__half>(held[i], w);
            x.get(i * kWarpSize + lane).unpack(v);
            sum.add(w, v);
          }
          total[0] = sum.total();
        } else {
          float sums[2][4] = {};
#pragma unroll
          for (int i = 0; i < kVectors; i++) {
            const uint4 none = {};
            add(sums[i % 2], held[i], none, vector_of(s.x, i * kWarpSize + lane), vector_of(s.x + kLowAt, i * kWarpSize + lane));
          }
          total[0] = diagonal(sums[0][0] + sums[1][0], sums[0][1] + sums[1][1], lane);
        }
        const float value = warp_sums(total, lane);
        if (lane == 0) a.out[first + row] = value;
      }
    } else {
      // Turn t of a phase is of the team t % kTeams, so that every phase begins with the first one.
      for (int base = begin + team * kTurn; base < end; base += kTeams * kTurn, turns++) {
        uint4 held[kTurn * kSteps];
#pragma unroll
        for (int r = 0; r < kTurn; r++) {
          if (base + r >= end) break;
          StageReads reads;
          const Place at(base + r);
          mbarrier_wait_local(&s.full[at.stage], at.parity);
          const uint4* data = reinterpret_cast<const uint4*>(s.stages + at.stage * kRowBytes + piece * kPieceBytes);
#pragma unroll
          for (int i = 0; i < kSteps; i++) {
            held[r * kSteps + i] = data[i * kWarpSize + lane];
            reads.saw(held[r * kSteps + i].x);
          }
          reads.wait();
          mbarrier_arrive_local(&s.empty[at.stage]);
        }
        make_ready();
        if (on_tensor_cores(kForm)) __syncwarp();  // a product takes the whole warp
        float totals[kTurn];
        if constexpr (kForm == kShared) {
          const SplitVector x{reinterpret_cast<float4*>(s.x), reinterpret_cast<float4*>(s.x) + kColumns / 8};
          LaneSum sums[kTurn];
#pragma unroll
          for (int i = 0; i < kSteps; i++) {
            float v[kVector];
            x.get((piece * kSteps + i) * kWarpSize + lane).unpack(v);
#pragma unroll
            for (int r = 0; r < kTurn; r++) {
              float w[kVector];
              unpack8<__half>(held[r * kSteps + i], w);
              sums[r].add(w, v);
            }
          }
#pragma unroll
          for (int r = 0; r < kTurn; r++) totals[r] = sums[r].total();
          const float total = warp_sums(totals, lane);
          if (lane % (kWarpSize / kTurn) == 0) s.pieces[team][turns & 1][lane / (kWarpSize / kTurn)][piece] = total;
        } else {
          float sums[2][4] = {};
#pragma unroll
          for (int i = 0; i < kSteps; i++) {
            const int at = (piece * kSteps + i) * kWarpSize + lane;
            const uint4 nearest = vector_of(s.x, at), rest = vector_of(s.x + kLowAt, at);
#pragma unroll
            for (int pair = 0; pair < 2; pair++) add(sums[pair], held[2 * pair * kSteps + i], held[(2 * pair + 1) * kSteps + i], nearest, rest);
          }
#pragma unroll
          for (int r = 0; r < kTurn; r++) totals[r] = diagonal(sums[r / 2][r % 2 * 2], sums[r / 2][r % 2 * 2 + 1], lane);
          const float total = warp_sums(totals, lane);
          if (lane % (kWarpSize / kTurn) == 0) s.pieces[team][turns & 1][lane / (kWarpSize / kTurn)][piece] = total;
        }
        asm volatile("barrier.sync %0, %1;" ::"r"(1 + team), "n"(kTurn * kWarpSize) : "memory");
        if (turns % kTurn == piece && lane < kTurn && base + lane < end) {
          const float(&p)[kTurn] = s.pieces[team][turns & 1][lane];
          a.out[first + base + lane] = (p[0] + p[1]) + (p[2] + p[3]);
        }
      }
    }
    make_ready();
    mbarrier_arrive_local(&s.done);
  }
}

struct Device {
  const char* weights;
  const float* x;
  float* out;
  int ctas;
};

// A program's output, a line.
static void ask(const char* command, char* line, int size) {
  FILE* f = popen(command, "r");
  if (f == nullptr || fgets(line, size, f) == nullptr) snprintf(line, size, "?\n");
  if (f != nullptr) pclose(f);
}

template <Form kForm, int kWarps>
void measure(const char* name, const Device& d, int rows, const std::vector<__half>& weights, const std::vector<float>& x) {
  const auto kernel = multiply<kForm, kWarps>;
  CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared<kWarps>)));
  const auto launch = [&](int phase, int pause) {
    kernel<<<d.ctas, (kWarps + 1 + others(kWarps)) * kWarpSize, sizeof(Shared<kWarps>)>>>({d.weights, d.x, d.out, rows, phase, pause});
  };
  CHECK(cudaMemset(d.out, 0xff, rows * sizeof(float)));
  launch(48, 1000);
  CHECK(cudaDeviceSynchronize());
  std::vector<float> out(rows);
  CHECK(cudaMemcpy(out.data(), d.out, rows * sizeof(float), cudaMemcpyDeviceToHost));
  double worst = 0;
  const int known = weights.size() / kColumns;  // rows repeat
  for (int row = 0; row < rows; row += row < 4096 ? 1 : 997) {
    double sum = 0, size = 0;
    for (int i = 0; i < kColumns; i++) {
      const double term = static_cast<double>(__half2float(weights[static_cast<size_t>(row % known) * kColumns + i])) * x[i];
      sum += term, size += std::fabs(term);
    }
    worst = std::max(worst, std::isnan(out[row]) ? 1e9 : std::fabs(out[row] - sum) / size);
  }
  printf("%-7s %d warps: error %.2g of the sum of sizes\n", name, kWarps, worst);
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
      printf("  a wait of %5d clocks every %10d rows: %.4f ms, %.3f TB/s, %.2f us a phase\n", pause, phase, ms, bytes / ms / 1e9,
             ms * 1e3 / std::max(1.0, static_cast<double>(rows) / d.ctas / phase));
    }
  }
  for (int i = 0; i < 2500; i++) launch(1 << 30, 0);  // some two seconds
  char line[200];
  for (int i = 0; i < 3; i++) {
    ask("sleep 0.3; nvidia-smi --query-gpu=power.draw,clocks.sm --format=csv,noheader", line, sizeof(line));
    printf("  streaming: %s", line);
  }
  CHECK(cudaDeviceSynchronize());
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
  measure<kFma, 7>("fma", d, rows, weights, x);
  measure<kTensor, 7>("tensor", d, rows, weights, x);
  measure<kShared, 8>("shared", d, rows, weights, x);
  measure<kSharedTensor, 8>("shared tensor", d, rows, weights, x);
  measure<kSharedTensor, 4>("shared tensor", d, rows, weights, x);
}
