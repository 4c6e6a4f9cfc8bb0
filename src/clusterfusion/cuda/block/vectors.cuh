// The vector warps' side of a decoder layer: norms, queries and attention's parts, activations from other CTAs, residual, and the waits in between.
#pragma once

#include <cuda/std/type_traits>

#include "block/attend.cuh"
#include "block/residual.cuh"
#include "block/trace.cuh"

namespace clusterfusion {

// Where the counters stand once all have arrived for a layer.
struct LayerTargets {
  unsigned all_ctas, all_bundles;
};

// Tracer: a Trace of trace.cuh, or NoTrace, which costs nothing.
template <typename S, typename Tracer = NoTrace>
class VectorWarps : public Attention<S> {
  using Base = Attention<S>;
  using typename Base::DownTiles;
  using typename Base::W;
  using Base::block_sync;
  using typename Base::OutTiles;
  using Base::kBiases;
  using Base::kDownBias;
  using Base::kGateBias;
  using Base::kOutBias;
  using Base::kUpBias;
  using Base::kVectorBytes;
  using Base::local_;
  using Base::rows_from;
  using Base::rows_to;
  using Base::s_;
  using Base::thread_;
  using Base::u_;
  static constexpr int kThreads = S::kVectorThreads;
  static constexpr int kQuads = S::kHidden / 4;
  static constexpr int kItems = (kQuads + kThreads - 1) / kThreads * 4;  // of a vector, elements a thread
  static constexpr int kBiasItems = (kBiases + kThreads - 1) / kThreads;

 public:
  using typename Base::Shared;

  __device__ VectorWarps(
      const Workspace& workspace, int position, Shared& shared, Tracer& trace)
      : Base(workspace, position, shared), trace_(trace) {}

  // One layer, or a segment of it. `layer` counts those of a launch, `epoch` names the
  // layer's tagged values. kFaultCta, for tests: that CTA never arrives for its part of h.
  template <Segment kSegment, int kFaultCta = -1, typename Residual>
  __device__ void run(
      const LayerOf& w, const KvCache& cache, Residual& residual, const LayerTargets& targets, unsigned epoch,
      int layer) {
    constexpr bool kWhole = kSegment == Segment::whole;
    this->begin_layer();
    const SplitVector x1 = split_vector<S>(s_.vectors, 0);
    const int out_first = rows_from(S::kHidden), out_rows = rows_to(S::kHidden) - out_first;
    trace_.mark(TraceEvent::begin);
    // Read before they are needed: each would cost the trip to memory behind a finished sum.
    float biases[kBiasItems];
    load_biases(w, biases);

    if constexpr (runs<kSegment>(Segment::project)) {
      normalise<S::kParallel>(
          [&](int n) {
            return n == 0   ? w.now().norm1_weight
                   : n == 1 ? w.now().norm1_bias
                   : n == 2 ? w.now().norm2_weight
                            : w.now().norm2_bias;
          },
          [&](float (&values)[kItems]) {
            residual.read_input(*this, values);
            trace_.mark(TraceEvent::residual_read);
          },
          [&] { store_biases(biases); });
      this->signal(kNormed);
      trace_.mark(TraceEvent::normed);
      if constexpr (S::kGated && S::kParallel && !kWhole) finish_hidden<kWhole, kFaultCta>(layer);
    }
    // With parallel residual h comes as soon as the tile warps want it.
    if constexpr (S::kUpFirst && runs<kSegment>(Segment::output)) bring_hidden<kWhole, kFaultCta>(targets, layer);
    if constexpr (runs<kSegment>(Segment::attend)) {
      if (this->attends()) {
        if (this->works()) trace_.mark(TraceEvent::attention_wait);
        const bool tells =
            this->template attend<kWhole>(cache, layer, epoch, [&] { trace_.mark(TraceEvent::attention_begin); });
        // Also of a cluster without cached tokens, at once: the input that it has read tells that all have attended the layer before.
        if (kWhole && tells && thread_ == 0) grid_arrive(this->counter(kAttentionDone));
        if (this->works()) trace_.mark(TraceEvent::attention_done);
      }
    }
    if constexpr (S::kParallel && !S::kUpFirst && runs<kSegment>(Segment::output)) {
      bring_hidden<kWhole, kFaultCta>(targets, layer);
    }
    if constexpr (runs<kSegment>(Segment::output)) {
      trace_.mark(TraceEvent::output_wait);
      if constexpr (kWhole) this->wait(kAttentionDone, targets.all_bundles, kOnAttention);
      trace_.mark(TraceEvent::output_begin);
      this->template load_attention<kWhole>(x1, layer);
      this->signal(kAttended);
      trace_.mark(TraceEvent::output_ready);
      if constexpr (!kWhole) store_biases(biases), block_sync();
      if constexpr (S::kParallel) trace_.mark(TraceEvent::sums_wait);
      this->await(kOutputSums, layer);
      for (int row = thread_; row < out_rows; row += kThreads) {
        const int index = out_first + row;
        const float value = residual.input_row(row, index) + output_row(row);
        if constexpr (S::kParallel) {
          residual.write_output(row, index, value + down_row(row));
        } else {
          residual.write_middle(row, index, value);
        }
      }
      if constexpr (S::kParallel) {
        trace_.mark(TraceEvent::published);
      } else {
        residual.middle_done(*this);
      }
    }
    if constexpr (!S::kParallel && runs<kSegment>(Segment::expand)) {
      normalise<false>(
          [&](int n) { return n == 0 ? w.now().norm2_weight : w.now().norm2_bias; },
          [&](float (&values)[kItems]) { residual.read_middle(*this, values); },
          [&] { if constexpr (!kWhole) store_biases(biases); }, 1);
      this->signal(kMiddleNormed);
      if constexpr (S::kGated && !kWhole) finish_hidden<kWhole, kFaultCta>(layer);
    }
    if constexpr (!S::kParallel && runs<kSegment>(Segment::contract)) {
      bring_hidden<kWhole, kFaultCta>(targets, layer);
      if constexpr (!kWhole) store_biases(biases), block_sync();
      trace_.mark(TraceEvent::sums_wait);
      this->await(kDownSums, layer);
      for (int row = thread_; row < out_rows; row += kThreads) {
        residual.write_output(row, out_first + row, residual.middle_row(row, out_first + row) + down_row(row));
      }
      trace_.mark(TraceEvent::published);
    }
  }

  // The final norm, for the LM head's rows.
  template <typename Residual>
  __device__ void final_norm(const void* weight, const void* bias, Residual& residual) {
    trace_.mark(TraceEvent::begin);
    normalise<false>(
        [&](int n) { return n == 0 ? weight : bias; },
        [&](float (&values)[kItems]) {
          residual.read_input(*this, values);
          trace_.mark(TraceEvent::residual_read);
        },
        [] {});
    this->signal(kNormed);
    trace_.mark(TraceEvent::normed);
  }

 private:
  // This CTA's share of every bias vector, in the order of s_.biases.
  __device__ void load_biases(const LayerOf& w, float (&biases)[kBiasItems]) const {
#pragma unroll
    for (int i = 0; i < kBiasItems; i++) {
      const int at = i * kThreads + thread_;
      biases[i] = at < kUpBias     ? qkv_bias(w.now(), rows_from(S::kQkvRows) + at, rows_to(S::kQkvRows))
                  : at < kGateBias ? bias(w.now().up_bias, this->up_from() + at - kUpBias, this->up_to())
                  : at < kOutBias  ? bias(w.now().gate_bias, this->up_from() + at - kGateBias, this->up_to())
                  : at < kDownBias ? bias(w.now().o_bias, rows_from(S::kHidden) + at - kOutBias, rows_to(S::kHidden))
                  : at < kBiases   ? bias(w.now().down_bias, rows_from(S::kHidden) + at - kDownBias, rows_to(S::kHidden))
                                   : 0.0f;
    }
  }
  static __device__ float bias(const void* vector, int row, int end) {
    return row < end ? load_or_zero<W>(vector, row) : 0.0f;
  }
  static __device__ float qkv_bias(const LayerTensors& w, int row, int end) {
    if constexpr (S::kFusedQkv) {
      return bias(w.q_bias, row, end);
    } else {
      const QkvRow found = qkv_row<S>(w, row);
      return row < end ? load_or_zero<W>(found.bias, found.row) : 0.0f;
    }
  }
  __device__ void store_biases(const float (&biases)[kBiasItems]) {
#pragma unroll
    for (int i = 0; i < kBiasItems; i++) {
      const int at = i * kThreads + thread_;
      if (at < kBiases) s_.biases[at] = biases[i];
    }
  }

  // What read(values) gives, normed into vector `to`; with kBoth by norm 1 into the first and by norm 2 into the second, from
  // the same statistics. norm_of(n): weight and bias of norm 1, then of norm 2; asked for before read, which may wait. stage()
  // runs behind the sums' barriers, when nobody of the vector warps is still at work on what came before.
  template <bool kBoth, typename NormOf, typename Read, typename Stage>
  __device__ void normalise(NormOf norm_of, Read read, Stage stage, int to = 0) {
    OwnSums block(s_.block);
    constexpr bool kCentred = S::kNorm == Norm::layer_norm;  // the other one has no bias
    constexpr int kNorms = kBoth ? 4 : 2;
    // With more, norm weights would not fit beside the values; bf16 ones are converted as they come and take twice as many registers.
    constexpr int kRegisters = kItems * kNorms / (cuda::std::is_same_v<W, __half> ? 2 : 1);
    constexpr bool kEarly = kItems <= 16 && kRegisters <= 48;
    Vector<W, 4> norm[kEarly ? kItems / 4 : 1][kNorms] = {};
    float values[kItems] = {};
    int valid = 0;
    const auto load_norm = [&](int quad, int i) {
#pragma unroll
      for (int n = 0; n < kNorms; n += kCentred ? 1 : 2) norm[i][n] = static_cast<const Vector<W, 4>*>(norm_of(n))[quad];
    };
    for_my_quads<S>(values, [&](int quad, float* at) {
      if constexpr (kEarly) load_norm(quad, (at - values) / 4);
      valid = at - values + 4;
    });
    read(values);
    NormTransform t;
    if constexpr (kCentred) {
      t = layer_norm_transform(values, valid, 1.0f / S::kHidden, u_.eps, local_, block, block);
    } else {
      t = rms_norm_transform(values, valid, 1.0f / S::kHidden, u_.eps, local_, block, block);
    }
    for_my_quads<S>(values, [&](int quad, const float* at) {
      const int i = kEarly ? (at - values) / 4 : 0;
      if constexpr (!kEarly) load_norm(quad, 0);
      split_vector<S>(s_.vectors, to).quad(quad) = normed(at, t, norm[i][0], norm[i][1]);
      if constexpr (kBoth) split_vector<S>(s_.vectors, 1).quad(quad) = normed(at, t, norm[i][2], norm[i][3]);
    });
    stage();
  }

  // With a gate: this CTA's rows of h, of what the tile warps have summed.
  template <bool kWhole, int kFaultCta>
  __device__ void finish_hidden(int layer) {
    this->await(kExpanded, layer);
    const int first = this->up_from(), rows = this->up_to() - first;
    for (int row = thread_; row < rows; row += kThreads) {
      const float gate = s_.up_sums[2 * row] + s_.biases[kGateBias + row];
      const float up = s_.up_sums[2 * row + 1] + s_.biases[kUpBias + row];
      static_cast<W*>(u_.h)[first + row] = from_float<W>(activate<S::kActivation>(gate) * up);
    }
    if constexpr (kWhole) {
      block_sync();
      if (thread_ == 0 && (kFaultCta < 0 || this->cta_ != kFaultCta)) grid_arrive(this->counter(kHiddenDone));
    }
  }

  template <bool kWhole, int kFaultCta>
  __device__ void bring_hidden(const LayerTargets& targets, int layer) {
    if constexpr (S::kGated && kWhole) finish_hidden<kWhole, kFaultCta>(layer);
    trace_.mark(TraceEvent::down_wait);
    if constexpr (kWhole) this->wait(kHiddenDone, targets.all_ctas, kOnHidden);
    trace_.mark(TraceEvent::down_begin);
    load_hidden<kWhole>(layer);
    this->signal(kHidden);
    trace_.mark(TraceEvent::down_ready);
  }

  // h of all CTAs into shared memory, when the tile warps have done with what is there.
  template <bool kWhole>
  __device__ void load_hidden(int layer) {
    constexpr int kVectors = S::kIntermediate / kVector, kTogether = 8;
    uint4* to = reinterpret_cast<uint4*>(s_.vectors + kVectorBytes);
    for (int first = thread_; first < kVectors; first += kTogether * kThreads) {
      uint4 h[kTogether] = {};
#pragma unroll
      for (int i = 0; i < kTogether; i++) {
        if (first + i * kThreads < kVectors) h[i] = __ldcg(static_cast<const uint4*>(u_.h) + first + i * kThreads);
      }
      if constexpr (kWhole && !S::kGated) this->await(kExpanded, layer);  // with a gate, this role has finished them itself
#pragma unroll
      for (int i = 0; i < kTogether; i++) {
        if (first + i * kThreads < kVectors) to[first + i * kThreads] = h[i];
      }
    }
  }

  // A norm's sums over this CTA alone: in place of BlockSum and ClusterReduce, with two scratches in turn, so that one barrier a
  // sum is enough.
  class OwnSums {
   public:
    __device__ explicit OwnSums(typename Base::Block::Scratch (&scratch)[2]) : first_(scratch[0]), second_(scratch[1]) {}
    template <typename Team, int kCount>
    __device__ void add(Team& team, const float (&values)[kCount]) {
      (next_ ? second_ : first_).add(team, values);
      next_ = !next_;
    }
    __device__ float total(int i) const { return (next_ ? first_ : second_).total(i); }
    template <typename Team, typename Mine>
    __device__ void exchange(Team&, int count, Mine mine) {
#pragma unroll
      for (int i = 0; i < kNormSums; i++) results_[i] = i < count ? mine(i) : 0.0f;
    }
    __device__ float result(int i) const { return results_[i]; }

   private:
    typename Base::Block first_, second_;
    float results_[kNormSums];
    bool next_ = false;
  };

  static __device__ float4 normed(const float* values, NormTransform t, const Vector<W, 4>& weight, const Vector<W, 4>& bias) {
    float y[4];
#pragma unroll
    for (int k = 0; k < 4; k++) {
      y[k] = fmaf(fmaf(values[k], t.scale, t.shift), to_float(weight.element[k]), to_float(bias.element[k]));
    }
    return make_float4(y[0], y[1], y[2], y[3]);
  }

  // A row of the output projection, and of the down projection, with its bias.
  __device__ float output_row(int row) const { return folded<OutTiles>(s_.biases[kOutBias + row], s_.o_sums, row); }
  __device__ float down_row(int row) const { return folded<DownTiles>(s_.biases[kDownBias + row], s_.down_sums, row); }
  template <typename Tiles>
  static __device__ float folded(float value, const float* sums, int row) {
#pragma unroll
    for (int part = 0; part < Tiles::kParts; part++) value += sums[row * Tiles::kParts + part];
    return value;
  }

  Tracer& trace_;
};

}  // namespace clusterfusion
