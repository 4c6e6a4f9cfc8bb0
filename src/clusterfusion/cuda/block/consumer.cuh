// The consumer warps' side of a decoder layer: norms, projections, attention, residual, and the waits in between.
#pragma once

#include "block/share.cuh"
#include "collectives/cluster_gather.cuh"
#include "collectives/cluster_reduce.cuh"
#include "collectives/team.cuh"
#include "ops/norm.cuh"
#include "primitives/grid_counter.cuh"

namespace clusterfusion {

template <typename S, Segment kSegment>
class BlockConsumer : public BlockShare<S, kSegment> {
  using Base = BlockShare<S, kSegment>;
  using X = typename S::X;
  using typename Base::Cached;
  using typename Base::DownTiles;
  using typename Base::HiddenTiles;
  using typename Base::RingType;
  using typename Base::W;
  using Base::a_;
  using Base::attends;
  using Base::cached_tiles;
  using Base::cta_;
  using Base::head;
  using Base::kWhole;
  using Base::position_;
  using Base::rows_from;
  using Base::rows_to;
  using Base::runs;
  using Base::split;
  using Base::tile_tokens;
  using Base::up_before;
  static constexpr int kOutRows = (S::kHidden + S::kCtas - 1) / S::kCtas + 1;
  static constexpr int kPartial = kPartialFloats<S::kHeadDim>;
  using LocalTeam = PartialTeam<1, S::kThreads, 0, 1>;
  using PairTeam = PartialTeam<S::kMerged, S::kThreads, 0, 1, kPartial < S::kThreads ? kPartial : S::kThreads>;
  using Block = BlockSum<kNormSums, S::kThreads>;
  using Reduce = ClusterReduce<float, kNormSums, 1, Exchange::direct>;
  using Gather = ClusterGather<float, kPartial, S::kMerged, Exchange::direct>;

  static __host__ __device__ constexpr int align16(int bytes) { return (bytes + 15) / 16 * 16; }
  static constexpr int kVectorBytes = S::kHidden * 4;
  // Vectors in shared memory: the two normed x of the projections; later the attention's output and h.
  static constexpr int kProjectBytes = 2 * kVectorBytes;
  static constexpr int kOutputBytes = kVectorBytes + align16(S::kIntermediate * 2);

 public:
  struct Shared {
    alignas(128) char stages[S::kStages * S::kStageBytes];
    alignas(16) char vectors[kProjectBytes > kOutputBytes ? kProjectBytes : kOutputBytes];
    float query[S::kHeadDim], key[S::kHeadDim], value[S::kHeadDim];
    float slots[(S::kWarps + 1) * kPartial];  // one a warp, and the new token
    float o_sums[kOutRows * HiddenTiles::kParts];
    float down_sums[kOutRows * DownTiles::kParts];
    typename RingType::Barriers ring;
    typename Block::Scratch block;
    typename Reduce::Scratch reduce;
    typename Gather::Scratch gather;
    typename LocalTeam::Scratch local;
    typename PairTeam::Scratch pair;
    unsigned warps_done[2];
    int expired;
  };

  __device__ BlockConsumer(const LayerArguments& arguments, Shared& shared)
      : Base(arguments), s_(shared), warp_(threadIdx.x / kWarpSize), lane_(threadIdx.x % kWarpSize) {}

  // One thread, before the first barrier of the CTA.
  static __device__ void init(Shared& shared) {
    RingType::init(shared.ring);
    shared.warps_done[0] = shared.warps_done[1] = 0;
    shared.expired = 0;
    LocalTeam::init(shared.local);
    PairTeam::init(shared.pair);
    mbarrier_init_fence();
  }

  __device__ void run() {
    LocalTeam team(s_.local);
    RingConsumer<RingType> ring(s_.stages, s_.ring, warp_, lane_);
    const SplitVector x1 = split_vector(0), x2 = split_vector(1);
    const int up_first = rows_from(S::kIntermediate), up_rows = rows_to(S::kIntermediate) - up_first;
    const int up_early = up_before(up_rows);
    const int out_first = rows_from(S::kHidden), out_rows = rows_to(S::kHidden) - out_first;
    // Where the counters will be once all have arrived in this launch. Read before this CTA arrives anywhere, and nobody
    // arrives at these two before all CTAs have arrived for q, k and v.
    const unsigned all_ctas = kWhole ? __ldcg(counter(kLaunchDone)) + S::kCtas : 0;
    const unsigned all_heads = kWhole ? __ldcg(counter(kAttentionDone)) + S::kHeads * S::kPartials : 0;

    if constexpr (runs(Segment::project)) {
      normalise(team, static_cast<const X*>(a_.x), a_.norm1_weight, a_.norm1_bias, x1, S::kParallel);
      const int first = rows_from(S::kQkvRows), rows = rows_to(S::kQkvRows) - first;
      gemv_rows<HiddenTiles>(ring, rows, x1, [&](int row, float value) {
        a_.qkv[first + row] = value + load_or_zero<W>(a_.qkv_bias, first + row);
      });
      warp_done(0, kQkvDone);
      if constexpr (S::kParallel) up(ring, up_first, 0, up_early, x2);
    }
    if constexpr (runs(Segment::attend)) {
      if (attends()) {
        wait(team, kQkvDone, all_ctas);
        attend(ring);
      }
    }
    if constexpr (kWhole && S::kParallel) up(ring, up_first, up_early, up_rows, x2);
    if constexpr (S::kParallel && kWhole) warp_done(1, kHiddenDone);
    if constexpr (runs(Segment::output)) {
      wait(team, kAttentionDone, all_heads);
      load_attention(x1);
      team.block_sync();
      gemv_parts<HiddenTiles>(ring, out_rows, x1, s_.o_sums);
    }
    if constexpr (!S::kParallel) {
      if constexpr (runs(Segment::output)) {
        team.block_sync();
        for (int row = threadIdx.x; row < out_rows; row += S::kThreads) {
          a_.middle[out_first + row] = residual(out_first + row) + attention_row(row, out_first + row);
        }
        team.block_sync();
        if (kWhole && threadIdx.x == 0) grid_arrive(counter(kMiddleDone));
      }
      if constexpr (runs(Segment::expand)) {
        wait(team, kMiddleDone, all_ctas);
        normalise(team, a_.middle, a_.norm2_weight, a_.norm2_bias, x2, false);
        up(ring, up_first, 0, up_rows, x2);
        warp_done(1, kHiddenDone);
      }
    }
    if constexpr (S::kParallel ? runs(Segment::output) : runs(Segment::contract)) {
      wait(team, kHiddenDone, all_ctas);
      uint4* hidden = reinterpret_cast<uint4*>(s_.vectors + kVectorBytes);
      for (int i = threadIdx.x; i < S::kIntermediate / kVector; i += S::kThreads) hidden[i] = __ldcg(static_cast<const uint4*>(a_.h) + i);
      team.block_sync();
      gemv_parts<DownTiles>(ring, out_rows, PackedVector<W>{hidden}, s_.down_sums);
      team.block_sync();
      for (int row = threadIdx.x; row < out_rows; row += S::kThreads) {
        const int index = out_first + row;
        float value;
        if constexpr (S::kParallel) {
          value = residual(index) + attention_row(row, index);
        } else {
          value = __ldcg(a_.middle + index);
        }
        float mlp = load_or_zero<W>(a_.down_bias, index);
#pragma unroll
        for (int part = 0; part < DownTiles::kParts; part++) mlp += s_.down_sums[row * DownTiles::kParts + part];
        static_cast<X*>(a_.out)[index] = from_float<X>(value + mlp);
      }
    }
    if (kWhole && threadIdx.x == 0) grid_count(counter(kLaunchDone));
  }

  // Instead of run, in all CTAs alike, when the position is not in the cache: nothing is touched but the results.
  __device__ void refuse() {
    if (cta_ == 0 && threadIdx.x == 0) record_error(kBadPosition, a_.max_len, position_);
    constexpr float kNaN = cuda::std::numeric_limits<float>::quiet_NaN();
    constexpr bool kWritesOut = S::kParallel ? runs(Segment::output) : runs(Segment::contract);
    const int last = rows_to(S::kHidden);
    for (int i = rows_from(S::kHidden) + threadIdx.x; i < last; i += S::kThreads) {
      if constexpr (kWritesOut) static_cast<X*>(a_.out)[i] = from_float<X>(kNaN);
      if (runs(Segment::attend) && a_.k_new != nullptr) {
        static_cast<W*>(a_.k_new)[i] = from_float<W>(kNaN);
        static_cast<W*>(a_.v_new)[i] = from_float<W>(kNaN);
      }
    }
  }

 private:
  __device__ SplitVector split_vector(int which) const {
    float4* base = reinterpret_cast<float4*>(s_.vectors + which * kVectorBytes);
    return {base, base + S::kHidden / kVector};
  }

  // x, normed by norm 1 into `first`; with `both`, by norm 2 into the second vector too, from the same statistics.
  template <typename T>
  __device__ void normalise(LocalTeam& team, const T* x, const void* weight, const void* bias, const SplitVector& first, bool both) {
    constexpr int kQuads = S::kHidden / 4;
    constexpr int kItems = (kQuads + S::kThreads - 1) / S::kThreads * 4;
    Block block(s_.block);
    Reduce reduce(s_.reduce);
    float values[kItems];
    int valid = 0;
#pragma unroll
    for (int i = 0; i < kItems / 4; i++) {
      const int quad = i * S::kThreads + threadIdx.x;
      if (quad < kQuads) {
        const auto loaded = reinterpret_cast<const Vector<T, 4>*>(x)[quad];
#pragma unroll
        for (int k = 0; k < 4; k++) values[4 * i + k] = to_float(loaded.element[k]);
        valid = 4 * i + 4;
      }
    }
    const NormTransform t = layer_norm_transform(values, valid, 1.0f / S::kHidden, a_.eps, team, block, reduce);
    const SplitVector second = split_vector(1);
#pragma unroll
    for (int i = 0; i < kItems / 4; i++) {
      const int quad = i * S::kThreads + threadIdx.x;
      if (quad < kQuads) {
        write_normed(first, quad, &values[4 * i], t, weight, bias);
        if (both) write_normed(second, quad, &values[4 * i], t, a_.norm2_weight, a_.norm2_bias);
      }
    }
    team.block_sync();
  }

  __device__ void write_normed(const SplitVector& to, int quad, const float* values, NormTransform t, const void* weight, const void* bias) {
    const auto w = static_cast<const Vector<W, 4>*>(weight)[quad];
    const auto b = static_cast<const Vector<W, 4>*>(bias)[quad];
    float y[4];
#pragma unroll
    for (int k = 0; k < 4; k++) {
      y[k] = fmaf(fmaf(values[k], t.scale, t.shift), to_float(w.element[k]), to_float(b.element[k]));
    }
    to.quad(quad) = make_float4(y[0], y[1], y[2], y[3]);
  }

  // Rows whose parts, if any, one lane can finish at once: calls out(row, value).
  template <typename Tiles, typename Ring_, typename V, typename Out>
  __device__ void gemv_rows(Ring_& ring, int rows, const V& x, Out out) {
    static_assert(Tiles::kParts == 1, "hidden rows fit a stage");
    gemv<W, Tiles>(ring, rows, x, lane_, [&](int row, int, float value) { out(row, value); });
  }

  template <typename Tiles, typename Ring_, typename V>
  __device__ void gemv_parts(Ring_& ring, int rows, const V& x, float* sums) {
    gemv<W, Tiles>(ring, rows, x, lane_, [&](int row, int part, float value) { sums[row * Tiles::kParts + part] = value; });
  }

  template <typename Ring_>
  __device__ void up(Ring_& ring, int first, int from, int to, const SplitVector& x) {
    gemv_rows<HiddenTiles>(ring, to - from, x, [&](int row, float value) {
      const int index = first + from + row;
      static_cast<W*>(a_.h)[index] = from_float<W>(gelu<S::kGelu>(value + load_or_zero<W>(a_.up_bias, index)));
    });
  }

  __device__ float residual(int index) const { return to_float(static_cast<const X*>(a_.x)[index]); }
  __device__ float attention_row(int row, int index) const {
    float value = load_or_zero<W>(a_.o_bias, index);
#pragma unroll
    for (int part = 0; part < HiddenTiles::kParts; part++) value += s_.o_sums[row * HiddenTiles::kParts + part];
    return value;
  }

  // ---- attention: this CTA's part of its head

  template <typename Ring_>
  __device__ void attend(Ring_& ring) {
    PairTeam team(s_.pair);
    load_heads();
    team.block_sync();
    AttentionWarp<W, Cached> mine(lane_, s_.query);
    int slot = -1;
    ring.tiles(cached_tiles(), [&](int tile, const char* data) {
      mine.add_tile(data, tile_tokens(tile));
      slot = tile % S::kWarps;
    });
    // Slots without a tile: a warp's own number cannot be used, since it depends on what ran before.
    const int used = min(cached_tiles(), S::kWarps);
    if (slot >= 0) mine.store(s_.slots + slot * kPartial);
    int count = used;
    if (split() == 0) {
      if (warp_ == 0) new_token(s_.slots + used * kPartial);
      count++;
    }
    team.block_sync();
    SoftmaxScale scale{-kInfinity, 0.0f};
    Gather gather(s_.gather);
    // Each thread merges one dimension; the scale is the same on all of them.
    gather.exchange(team, [&](int i) {
      const float value = merge_partials<S::kHeadDim>(s_.slots, count, kPartial, i < S::kHeadDim ? i : 0, scale);
      return i < S::kHeadDim ? value : i == S::kHeadDim ? scale.maximum : i == S::kHeadDim + 1 ? scale.sum : 0.0f;
    });
    if (S::kMerged == 1 || team.rank() == 0) {
      float* to = a_.partials + (head() * S::kPartials + split() / S::kMerged) * kPartial;
      for (int i = threadIdx.x; i < kPartial; i += S::kThreads) {
        const float value = merge_partials<S::kHeadDim>(gather.result(), S::kMerged, kPartial, i < S::kHeadDim ? i : 0, scale);
        to[i] = i < S::kHeadDim ? value : i == S::kHeadDim ? scale.maximum : i == S::kHeadDim + 1 ? scale.sum : 0.0f;
      }
      team.block_sync();
      if (kWhole && threadIdx.x == 0) grid_arrive(counter(kAttentionDone));
    }
    if (team.expired() && threadIdx.x == 0) record_error(kClusterDependency, 0, 0);
  }

  // q, k and v of this CTA's head: rotated, k and v rounded as the cache holds them; q scaled. Split 0 writes the cache.
  __device__ void load_heads() {
    const float* qkv = a_.qkv + head() * 3 * S::kHeadDim;
    const float scale = rsqrtf(static_cast<float>(S::kHeadDim)) * kLog2E;
    constexpr int kHalf = S::kRotary / 2;
    for (int i = threadIdx.x; i < S::kHeadDim; i += S::kThreads) {
      float q = __ldcg(qkv + i), k = __ldcg(qkv + S::kHeadDim + i);
      const float v = __ldcg(qkv + 2 * S::kHeadDim + i);
      if (i < S::kRotary) {
        const int pair = i < kHalf ? i + kHalf : i - kHalf, angle = i < kHalf ? i : i - kHalf + a_.second_angles;
        const float sign = i < kHalf ? -1.0f : 1.0f;
        const float c = a_.cos[position_ * a_.table_stride + angle], s = sign * a_.sin[position_ * a_.table_stride + angle];
        q = q * c + __ldcg(qkv + pair) * s;
        k = k * c + __ldcg(qkv + S::kHeadDim + pair) * s;
      }
      const W k_rounded = from_float<W>(k), v_rounded = from_float<W>(v);
      s_.query[i] = q * scale;
      s_.key[i] = to_float(k_rounded);
      s_.value[i] = to_float(v_rounded);
      if (split() == 0) {
        const cuda::std::int64_t at = head() * a_.head_stride + position_ * a_.token_stride + i;
        static_cast<W*>(a_.k_cache)[at] = k_rounded;
        static_cast<W*>(a_.v_cache)[at] = v_rounded;
        if (a_.k_new != nullptr) {
          static_cast<W*>(a_.k_new)[head() * S::kHeadDim + i] = k_rounded;
          static_cast<W*>(a_.v_new)[head() * S::kHeadDim + i] = v_rounded;
        }
      }
    }
  }

  // The current token attends to itself: one warp.
  __device__ void new_token(float* partial) {
    float dot = 0;
    for (int i = lane_; i < S::kHeadDim; i += kWarpSize) dot = fmaf(s_.query[i], s_.key[i], dot);
    dot = warp_sum(dot);
    for (int i = lane_; i < S::kHeadDim; i += kWarpSize) partial[i] = s_.value[i];
    if (lane_ == 0) partial[S::kHeadDim] = dot, partial[S::kHeadDim + 1] = 1.0f;
  }

  // The attention's output of all heads, merged from the partials, into shared memory.
  __device__ void load_attention(const SplitVector& to) {
    for (int quad = threadIdx.x; quad < S::kHidden / 4; quad += S::kThreads) {
      const int h = quad * 4 / S::kHeadDim, dim = quad * 4 % S::kHeadDim;
      const float* partials = a_.partials + h * S::kPartials * kPartial;
      float maximum = -kInfinity;
#pragma unroll
      for (int i = 0; i < S::kPartials; i++) maximum = fmaxf(maximum, __ldcg(partials + i * kPartial + S::kHeadDim));
      float4 value = make_float4(0, 0, 0, 0);
      float sum = 0;
#pragma unroll
      for (int i = 0; i < S::kPartials; i++) {
        const float2 scale = __ldcg(reinterpret_cast<const float2*>(partials + i * kPartial + S::kHeadDim));
        const float4 part = __ldcg(reinterpret_cast<const float4*>(partials + i * kPartial + dim));
        const float weight = scale.x == -kInfinity ? 0.0f : exp2f(scale.x - maximum);
        sum += weight * scale.y;
        value.x += weight * part.x, value.y += weight * part.y, value.z += weight * part.z, value.w += weight * part.w;
      }
      to.quad(quad) = make_float4(value.x / sum, value.y / sum, value.z / sum, value.w / sum);
    }
  }

  // ---- dependencies between CTAs

  __device__ unsigned* counter(Counter which) const { return a_.counters + which * kCounterStride; }

  // The last consumer warp of the CTA to come here arrives for the CTA.
  __device__ void warp_done(int which, Counter arrival) {
    if constexpr (!kWhole) return;
    __syncwarp();
    if (lane_ == 0) {
      unsigned before;
      asm volatile("atom.acq_rel.cta.shared.add.u32 %0, [%1], 1;"
                   : "=r"(before)
                   : "r"(static_cast<unsigned>(__cvta_generic_to_shared(&s_.warps_done[which])))
                   : "memory");
      if (before + 1 == S::kWarps) grid_arrive(counter(arrival));
    }
  }

  // All consumers wait for a counter; in segments of their own there is nothing to wait for. Never hangs: when the wait
  // expires, the error is recorded once and everything goes on with what is there.
  __device__ void wait(LocalTeam& team, Counter which, unsigned target) {
    if constexpr (kWhole) {
      if (threadIdx.x == 0 && !s_.expired && !grid_wait(counter(which), target)) {
        record_error(which, target, load_acquire(counter(which)));
      }
    }
    team.block_sync();
  }

  // The first error of a launch, for the host: the details, then the word that says they are there. One thread.
  __device__ void record_error(unsigned dependency, unsigned expected, unsigned seen) {
    s_.expired = 1;
    if (atomicCAS(&a_.error[kErrorClaim], 0u, 1u) != 0) return;
    a_.error[1] = cta_, a_.error[2] = expected, a_.error[3] = seen;
    __threadfence_system();
    *const_cast<volatile unsigned*>(a_.error) = dependency + 1;
  }

  Shared& s_;
  const int warp_, lane_;
};

}  // namespace clusterfusion
