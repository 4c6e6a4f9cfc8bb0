// The vector warps' side of a decoder layer: norms, queries and attention's parts, activations from other CTAs, residual, and the waits in between.
#pragma once

#include <cuda/std/type_traits>

#include "block/attend.cuh"
#include "block/residual.cuh"
#include "block/trace.cuh"

namespace clusterfusion {

// Where the counters stand once all have arrived for a layer.
struct LayerTargets {
  unsigned all_ctas, group_bundles;
};

// Tracer: a Trace of trace.cuh, or NoTrace, which costs nothing.
template <typename S, typename Tracer = NoTrace>
class VectorWarps : public Attention<S> {
  using Base = Attention<S>;
  using typename Base::DownTiles;
  using typename Base::W;
  using typename Base::UpRows;
  using Base::kBiases;
  using Base::kDownBias;
  using Base::kGroupColumns;
  using Base::kHiddenGroups;
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
  using Base::block_sync;
  using typename Base::Shared;

  __device__ VectorWarps(
      const Workspace& workspace, int position, Shared& shared, Tracer& trace)
      : Base(workspace, position, shared), trace_(trace) {}

  // One layer, or a segment of it. `layer` counts those of a step, `epoch` names the
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
      normalise<S::kParallel, false>(
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
      trace_.mark(TraceEvent::normed);
      if constexpr (S::kGated && S::kParallel && !kWhole) finish_hidden<kWhole, kFaultCta>(layer, 0, 0);
    }
    // With parallel residual h comes as soon as the tile warps want it.
    if constexpr (S::kUpFirst && runs<kSegment>(Segment::output)) bring_hidden<kWhole, kFaultCta>(targets, layer);
    if constexpr (runs<kSegment>(Segment::attend)) {
      if (this->attends()) {
        if (this->works()) trace_.mark(TraceEvent::attention_wait);
        const bool tells =
            this->template attend<kWhole>(cache, layer, epoch, [&] { trace_.mark(TraceEvent::attention_begin); });
        // Also of a cluster without cached tokens, at once: the input that it has read tells that all have attended the layer before.
        if (kWhole && tells && thread_ == 0) grid_arrive(this->counter(kAttentionDone + this->head_group()));
        if (this->works()) trace_.mark(TraceEvent::attention_done);
      }
    }
    if constexpr (S::kParallel && !S::kUpFirst && runs<kSegment>(Segment::output)) {
      bring_hidden<kWhole, kFaultCta>(targets, layer);
    }
    if constexpr (runs<kSegment>(Segment::output)) {
      trace_.mark(TraceEvent::output_wait);
#pragma unroll 1
      for (int group = 0; group < S::kHeadGroups; group++) {
        if constexpr (kWhole) this->wait(kAttentionDone + group, targets.group_bundles, kOnAttention);
        if (group == S::kHeadGroups - 1) trace_.mark(TraceEvent::output_begin);
        this->template load_attention<kWhole>(x1, layer, group);
        this->signal(kAttended + group);
      }
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
      normalise<false, true>(
          [&](int n) { return n == 0 ? w.now().norm2_weight : w.now().norm2_bias; },
          [&](float (&values)[kItems]) { residual.read_middle(*this, values); },
          [&] { if constexpr (!kWhole) store_biases(biases); });
      if constexpr (S::kGated && !kWhole) {
        int done = 0;
#pragma unroll 1
        for (int group = 0; group < kHiddenGroups; group++) done += finish_hidden<kWhole, kFaultCta>(layer, group, done);
      }
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
    normalise<false, false>(
        [&](int n) { return n == 0 ? weight : bias; },
        [&](float (&values)[kItems]) {
          residual.read_input(*this, values);
          trace_.mark(TraceEvent::residual_read);
        },
        [] {});
    trace_.mark(TraceEvent::normed);
  }

 private:
  // This CTA's share of every bias vector, in the order of s_.biases.
  __device__ void load_biases(const LayerOf& w, float (&biases)[kBiasItems]) const {
    const UpRows up_rows = this->up_rows();
#pragma unroll
    for (int i = 0; i < kBiasItems; i++) {
      const int at = i * kThreads + thread_;
      biases[i] = at < kUpBias     ? qkv_bias(w.now(), this->qkv_rows().row(at))
                  : at < kGateBias ? up_bias(w.now().up_bias, up_rows, at - kUpBias)
                  : at < kOutBias  ? up_bias(w.now().gate_bias, up_rows, at - kGateBias)
                  : at < kDownBias ? bias(w.now().o_bias, rows_from(S::kHidden) + at - kOutBias, rows_to(S::kHidden))
                  : at < kBiases   ? bias(w.now().down_bias, rows_from(S::kHidden) + at - kDownBias, rows_to(S::kHidden))
                                   : 0.0f;
    }
  }
  // Of the CTA's row `at` of the up projection.
  static __device__ float up_bias(const void* vector, const UpRows& up_rows, int at) {
    const int row = vector == nullptr ? -1 : up_rows.row(at);
    return row < 0 ? 0.0f : load_or_zero<W>(vector, row);
  }
  static __device__ float bias(const void* vector, int row, int end) {
    return row < end ? load_or_zero<W>(vector, row) : 0.0f;
  }
  static __device__ float qkv_bias(const LayerTensors& w, int row) {
    if (row < 0) return 0.0f;
    if constexpr (S::kFusedQkv) {
      return load_or_zero<W>(w.q_bias, row);
    } else {
      const QkvRow found = qkv_row<S>(w, row);
      return load_or_zero<W>(found.bias, found.row);
    }
  }
  __device__ void store_biases(const float (&biases)[kBiasItems]) {
#pragma unroll
    for (int i = 0; i < kBiasItems; i++) {
      const int at = i * kThreads + thread_;
      if (at < kBiases) s_.biases[at] = biases[i];
    }
  }

  // What read(values) gives, normed into the first vector; with kBoth by norm 1 into it and by norm 2 into the second, from the
  // same statistics; and tells the tile warps, of the input or the middle. norm_of(n): weight and bias of norm 1, then of norm 2; asked for
  // before read, which may wait. stage() runs behind the sums' barriers, when nobody of the vector warps is still at work on what came before.
  //
  // An RMSNorm's vector is given away without the factor that its sum of squares makes, which follows: rows are multiplied meanwhile.
  template <bool kBoth, bool kMiddle, typename NormOf, typename Read, typename Stage>
  __device__ void normalise(NormOf norm_of, Read read, Stage stage) {
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
    // In every form of a launch, marked or not: all have the same bits. By index: a loop over the range leaves many values in local memory.
#pragma unroll
    for (int k = 0; k < kItems; k++) values[k] = unmarked(values[k]);
    const auto store = [&](NormTransform t) {
      for_my_quads<S>(values, [&](int quad, const float* at) {
        const int i = kEarly ? (at - values) / 4 : 0;
        if constexpr (!kEarly) load_norm(quad, 0);
        split_vector<S>(s_.vectors, 0).quad(quad) = normed(at, t, norm[i][0], norm[i][1]);
        if constexpr (kBoth) split_vector<S>(s_.vectors, 1).quad(quad) = normed(at, t, norm[i][2], norm[i][3]);
      });
    };
    if constexpr (kCentred) {
      store(layer_norm_transform<Centring::where_needed>(values, valid, 1.0f / S::kHidden, u_.eps, local_, block, block));
      stage();
      this->signal(kMiddle ? kMiddleNormed : kNormed);
    } else {  // whoever reads these vectors has been waited for
      store({1.0f, 0.0f});
      this->signal(kMiddle ? kMiddleNormed : kNormed);
      const NormTransform t = rms_norm_transform(values, valid, 1.0f / S::kHidden, u_.eps, local_, block, block);
      stage();
      if (thread_ == 0) s_.scales[kMiddle] = t.scale;
      if constexpr (!kMiddle || !S::kGated) this->signal(kMiddle ? kMiddleScaled : kScaled);
    }
    block_sync();  // the sums' scratch, one for all norms, is free; and an RMSNorm's factor is there for vector warps that finish rows
  }

  // With a gate: this CTA's rows of a group of h, of what the tile warps have summed; `done` rows of the groups before. How many.
  template <bool kWhole, int kFaultCta>
  __device__ int finish_hidden(int layer, int group, int done) {
    this->await(kExpanded + group, layer);
    const UpRows up_rows = this->up_rows();
    const int first = up_rows.first(group), rows = up_rows.count(group);
    for (int row = thread_; row < rows; row += kThreads) {
      const int at = done + row;
      const float gate = this->template scaled<!S::kParallel>(s_.up_sums[2 * at], s_.biases[kGateBias + at]);
      const float up = this->template scaled<!S::kParallel>(s_.up_sums[2 * at + 1], s_.biases[kUpBias + at]);
      static_cast<W*>(u_.h)[first + row] = from_float<W>(activate<S::kActivation>(gate) * up);
    }
    if constexpr (kWhole) {
      block_sync();
      if (thread_ == 0 && (kFaultCta < 0 || this->cta_ != kFaultCta)) grid_arrive(this->counter(kHiddenDone + group));
    }
    return rows;
  }

  template <bool kWhole, int kFaultCta>
  __device__ void bring_hidden(const LayerTargets& targets, int layer) {
    int done = 0;
#pragma unroll 1
    for (int group = 0; group < kHiddenGroups; group++) {
      const bool last = group == kHiddenGroups - 1;  // what a trace is about: the others come while up goes on
      if constexpr (S::kGated && kWhole) done += finish_hidden<kWhole, kFaultCta>(layer, group, done);
      if (last) trace_.mark(TraceEvent::down_wait);
      if constexpr (kWhole) this->wait(kHiddenDone + group, targets.all_ctas, kOnHidden);
      if (last) trace_.mark(TraceEvent::down_begin);
      load_hidden<kWhole>(layer, group);
      this->signal(kHidden + group);
      if (last) trace_.mark(TraceEvent::down_ready);
    }
  }

  // A group of h of all CTAs into shared memory, when the tile warps have done with what is there.
  template <bool kWhole>
  __device__ void load_hidden(int layer, int group) {
    constexpr int kVectors = kGroupColumns / kVector, kTogether = smaller(8, (kVectors + kThreads - 1) / kThreads);
    const uint4* from = static_cast<const uint4*>(u_.h) + group * kVectors;
    uint4* to = reinterpret_cast<uint4*>(s_.vectors + kVectorBytes) + group * kVectors;
    for (int first = thread_; first < kVectors; first += kTogether * kThreads) {
      uint4 h[kTogether] = {};
#pragma unroll
      for (int i = 0; i < kTogether; i++) {
        if (first + i * kThreads < kVectors) h[i] = __ldcg(from + first + i * kThreads);
      }
      if constexpr (kWhole && !S::kGated) this->await(kExpanded + group, layer);  // with a gate, this role has finished it
#pragma unroll
      for (int i = 0; i < kTogether; i++) {
        if (first + i * kThreads < kVectors) to[first + i * kThreads] = h[i];
      }
    }
  }

  // A norm's sums over this CTA alone, in place of BlockSum and ClusterReduce. exchange has no barrier: before the scratch is used
  // again, the caller needs one.
  class OwnSums {
   public:
    __device__ explicit OwnSums(typename Base::Block::Scratch& scratch) : block_(scratch) {}
    template <typename Team, int kCount>
    __device__ void add(Team& team, const float (&values)[kCount]) { block_.add(team, values); }
    __device__ float total(int i) const { return block_.total(i); }
    template <typename Team, typename Mine>
    __device__ void exchange(Team&, int count, Mine mine) {
#pragma unroll
      for (int i = 0; i < kNormSums; i++) results_[i] = i < count ? mine(i) : 0.0f;
    }
    __device__ float result(int i) const { return results_[i]; }

   private:
    typename Base::Block block_;
    float results_[kNormSums];
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
  __device__ float output_row(int row) const { return folded<Base::kOutParts>(s_.biases[kOutBias + row], s_.o_sums, row); }
  __device__ float down_row(int row) const { return folded<DownTiles::kParts>(s_.biases[kDownBias + row], s_.down_sums, row); }
  template <int kParts>
  static __device__ float folded(float value, const float* sums, int row) {
#pragma unroll
    for (int part = 0; part < kParts; part++) value += sums[row * kParts + part];
    return value;
  }

  Tracer& trace_;
};

}  // namespace clusterfusion
