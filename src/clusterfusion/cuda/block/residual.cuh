// Where a layer's residual vector comes from and goes to. Both forms read, and write rows of, one vector after another:
// the layer's input, for sequential residual the middle (input + attention), the output.
//
// read_*(cta, values): every thread of the vector warps gets the elements of its quads (i * kThreads + thread), fp32, once they are there.
// *_row: of a row of this CTA; write_*: a row of the next vector; middle_done: this CTA has written its rows of the middle.
#pragma once

#include "block/cta.cuh"

namespace clusterfusion {

// Vector warps are a CTA's first, so threadIdx.x is the thread in the role.
//
// Calls visit(quad, values + 4 * i) for the quads of a vector of kHidden elements that fall to this thread.
template <typename S, int kItems, typename Visit>
__device__ __forceinline__ void for_my_quads(float (&values)[kItems], Visit visit) {
#pragma unroll
  for (int i = 0; i < kItems / 4; i++) {
    const int quad = i * S::kVectorThreads + threadIdx.x;
    if (quad < S::kHidden / 4) visit(quad, &values[4 * i]);
  }
}

template <typename T>
__device__ __forceinline__ void load_quad(const void* vector, int quad, float* values) {
  const auto loaded = static_cast<const Vector<T, 4>*>(vector)[quad];
#pragma unroll
  for (int k = 0; k < 4; k++) values[k] = to_float(loaded.element[k]);
}

// Of a launch over one layer: whole vectors in memory. The end of a launch, or a counter, says that they are complete.
template <typename S, bool kWhole>
class LayerResidual {
  using X = typename S::X;

 public:
  __device__ LayerResidual(const LayerArguments& arguments, unsigned all_ctas) : a_(arguments), all_ctas_(all_ctas) {}

  template <int kItems>
  __device__ void read_input(CtaState<S>&, float (&values)[kItems]) {
    for_my_quads<S>(values, [&](int quad, float* to) { load_quad<X>(a_.x, quad, to); });
  }
  __device__ float input_row(int, int index) const { return to_float(static_cast<const X*>(a_.x)[index]); }

  __device__ void write_middle(int, int index, float value) { a_.middle[index] = value; }
  __device__ void middle_done(CtaState<S>& cta) {
    cta.block_sync();
    if (kWhole && threadIdx.x == 0) grid_arrive(cta.counter(kMiddleDone));
  }
  template <int kItems>
  __device__ void read_middle(CtaState<S>& cta, float (&values)[kItems]) {
    if constexpr (kWhole) cta.wait(kMiddleDone, all_ctas_);
    for_my_quads<S>(values, [&](int quad, float* to) {
      *reinterpret_cast<float4*>(to) = __ldcg(reinterpret_cast<const float4*>(a_.middle) + quad);
    });
  }
  __device__ float middle_row(int, int index) const { return __ldcg(a_.middle + index); }

  __device__ void write_output(int, int index, float value) { static_cast<X*>(a_.out)[index] = from_float<X>(value); }

 private:
  const LayerArguments& a_;
  const unsigned all_ctas_;
};

// Of the whole step: versions of one vector, from the token's embedding on. Every element travels as a pair of its value and
// an epoch, 8 bytes, so that the data are their own flag: no counter, and no second trip. Readers poll.
//
// Two buffers in turn suffice: who writes version v + 1 has seen a dependency that every CTA meets after reading version v.
// A CTA's own rows stay in its shared memory, row by row with the thread that writes them.
template <typename S>
class ResidualStream {
 public:
  // `pairs` [2, hidden], zero before first use. Epochs from `epoch` on are this launch's; none of them is 0 or was used before.
  __device__ ResidualStream(const void* embedding, unsigned long long* pairs, unsigned epoch, float* own)
      : embedding_(embedding), pairs_(pairs), epoch_(epoch), own_(own) {}

  // This CTA's rows of version 0. The threads that will write them.
  __device__ void begin(int first, int rows) {
    for (int row = threadIdx.x; row < rows; row += S::kVectorThreads) {
      own_[row] = to_float(static_cast<const typename S::W*>(embedding_)[first + row]);
    }
  }

  template <int kItems>
  __device__ void read(CtaState<S>& cta, float (&values)[kItems]) {
    if (version_ == 0) {
      for_my_quads<S>(values, [&](int quad, float* to) { load_quad<typename S::W>(embedding_, quad, to); });
      return;
    }
#pragma unroll
    for (int first = 0; first < kItems / 4; first += kTogether) poll_quads(cta, values, first);
  }

  // Every thread of the vector warps, after the CTA has written its rows of the next version.
  __device__ void advance() { version_++; }

  __device__ void write(int row, int index, float value) {
    own_[row] = value;
    const unsigned long long pair = static_cast<unsigned long long>(epoch_ + version_ + 1) << 32 | __float_as_uint(value);
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(pairs_ + ((version_ + 1) & 1) * S::kHidden + index), "l"(pair)
                 : "memory");
  }

  template <int kItems>
  __device__ void read_input(CtaState<S>& cta, float (&values)[kItems]) {
    read(cta, values);
  }
  template <int kItems>
  __device__ void read_middle(CtaState<S>& cta, float (&values)[kItems]) {
    read(cta, values);
  }
  __device__ float input_row(int row, int) const { return own_[row]; }
  __device__ float middle_row(int row, int) const { return own_[row]; }
  __device__ void write_middle(int row, int index, float value) { write(row, index, value); }
  __device__ void write_output(int row, int index, float value) { write(row, index, value); }
  __device__ void middle_done(CtaState<S>&) { advance(); }

 private:
  // Waits for quads first to first + kTogether - 1 of this thread. `first` is known at compile time, once unrolled.
  template <int kItems>
  __device__ __forceinline__ void poll_quads(CtaState<S>& cta, float (&values)[kItems], int first) {
    const unsigned long long* from = pairs_ + (version_ & 1) * S::kHidden;
    const unsigned epoch = epoch_ + version_;
    unsigned there = 0, seen = 0;  // a bit a quad
    const auto poll = [&] {
      bool all = true;
#pragma unroll
      for (int i = first; i < first + kTogether; i++) {
        if (i >= kItems / 4) break;
        const int quad = i * S::kVectorThreads + threadIdx.x;
        if (quad >= S::kHidden / 4 || (there >> (i - first) & 1)) continue;
        bool complete = true;
#pragma unroll
        for (int half = 0; half < 2; half++) {
          unsigned long long a, b;
          asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];"
                       : "=l"(a), "=l"(b)
                       : "l"(from + 4 * quad + 2 * half)
                       : "memory");
          values[4 * i + 2 * half] = __uint_as_float(static_cast<unsigned>(a));
          values[4 * i + 2 * half + 1] = __uint_as_float(static_cast<unsigned>(b));
          seen = static_cast<unsigned>(a >> 32);
          complete = complete && seen == epoch && static_cast<unsigned>(b >> 32) == epoch;
        }
        if (complete) there |= 1u << (i - first);
        all = all && complete;
      }
      return all;
    };
    if (poll()) return;
    const long long start = clock64();
    bool done = false, given_up = false;
    while (!(done = poll()) && !(given_up = *const_cast<volatile int*>(&cta.shared().expired) != 0) &&
           clock64() - start < kWaitLimitClocks) {
      __nanosleep(kSpinNanoseconds);
    }
    if (!done && !given_up) cta.record_error(kResidualDependency, epoch, seen);
  }

  static constexpr int kTogether = 4;  // quads asked for at once: more do not fit the registers
  const void* embedding_;
  unsigned long long* pairs_;
  const unsigned epoch_;
  float* own_;
  unsigned version_ = 0;
};

}  // namespace clusterfusion
