// Where a layer's residual vector comes from and goes to. Both forms read, and write rows of, one vector after another:
// the layer's input, for sequential residual the middle (input + attention), the output.
//
// read_*(cta, values): every thread of the vector warps gets the elements of its quads (i * kThreads + thread), fp32, once they are there. Their last
// bit may be a mark (tagged.cuh).
// *_row: of a row of this CTA; write_*: a row of the next vector; middle_done: this CTA has written its rows of the middle.
#pragma once

#include "block/cta.cuh"

namespace clusterfusion {

// Vector warps are a CTA's first, so threadIdx.x is the thread in the role.
//
// Calls visit(quad, values + 4 * i) for the quads of a vector of kHidden elements that fall to this thread.
template <typename S, int kItems, typename Visit>
__device__ __forceinline__ void for_my_quads(float (&values)[kItems], Visit visit) {
  const int thread = opaque(threadIdx.x);
#pragma unroll
  for (int i = 0; i < kItems / 4; i++) {
    const int quad = i * S::kVectorThreads + thread;
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
    if constexpr (kWhole) cta.wait(kMiddleDone, all_ctas_, kOnMiddle);
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

// A vector of kHidden marked values, polled for by all vector warps, a few quads at a time: more do not fit the registers.
template <typename S, int kItems>
__device__ void read_marked(
    CtaState<S>& cta, const unsigned* from, unsigned mark, unsigned version, Dependency dependency, float (&values)[kItems]) {
  constexpr int kTogether = kItems / 4 < 8 ? kItems / 4 : 8;
  const int thread = opaque(threadIdx.x);
#pragma unroll
  for (int first = 0; first < kItems / 4; first += kTogether) {
    uint4 quads[kTogether] = {};  // with nothing in it, it would be kept from layer to layer
    const auto quad_of = [&](int i) { return (first + i) * S::kVectorThreads + thread; };
    const auto mine = [&](int i) { return first + i < kItems / 4 && quad_of(i) < S::kHidden / 4; };
    cta.template poll<kTogether>(
        dependency, version,
        [&](int i) {
          if (mine(i)) quads[i] = load_marked(from + 4 * quad_of(i));
        },
        [&](int i) { return !mine(i) || all_marked(quads[i], mark); });
#pragma unroll
    for (int i = 0; i < kTogether; i++) {
      if (!mine(i)) continue;
      const unsigned words[4] = {quads[i].x, quads[i].y, quads[i].z, quads[i].w};
#pragma unroll
      for (int k = 0; k < 4; k++) values[4 * (first + i) + k] = __uint_as_float(words[k]);
    }
  }
}

// Of the whole step: versions of one vector, from the token's embedding on, as marked values.
//
// Two buffers in turn suffice: who writes version v + 1 has seen a dependency that every CTA meets after reading version v.
// Versions that are written are counted from 1 on, through all steps over the same memory; each is in the other buffer than the one before, and
// a buffer's mark changes from one to its next.
// A CTA's own rows stay in its shared memory, row by row with the thread that writes them.
template <typename S>
class ResidualStream {
 public:
  // `marked` [2, hidden], zero before first use; `written` versions have been before this step.
  __device__ ResidualStream(const void* embedding, unsigned* marked, unsigned written, float* own)
      : embedding_(embedding), marked_(marked), written_(written), own_(own) {}

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
    } else {
      const unsigned version = written_ + version_;
      read_marked(cta, buffer(version), mark(version), version, kOnResidual, values);
    }
  }

  // Every thread of the vector warps, after the CTA has written its rows of the next version.
  __device__ void advance() { version_++; }

  __device__ void write(int row, int index, float value) {
    own_[row] = value;
    const unsigned version = written_ + version_ + 1;
    store_marked(buffer(version) + index, value, mark(version));
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
  __device__ unsigned* buffer(unsigned version) const { return marked_ + (version & 1) * S::kHidden; }
  static __device__ unsigned mark(unsigned version) { return (version + 1) >> 1 & 1; }  // of the first two 1, not what memory begins with

  const void* embedding_;
  unsigned* marked_;
  const unsigned written_;
  float* own_;
  unsigned version_ = 0;
};

}  // namespace clusterfusion
