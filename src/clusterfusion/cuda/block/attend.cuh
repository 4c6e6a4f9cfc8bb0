// The attention phase, on the vector warps: the queries, for the tile warps, which take the cached tokens; what these make of them and
// the new token, merged over the CTA, over the cluster, then over the bundle's clusters.
#pragma once

#include "block/residual.cuh"

namespace clusterfusion {

template <typename S>
class Attention : public CtaState<S> {
 protected:
  using Base = CtaState<S>;
  using typename Base::W;
  using Base::bundle;
  using Base::cached_tiles;
  using Base::kPartial;
  using Base::kPartialsFloats;
  using Base::kv_head;
  using Base::lane_;
  using Base::position_;
  using Base::s_;
  using Base::split;
  using Base::thread_;
  using Base::u_;
  static constexpr int kQueries = S::kQueries;

 public:
  using typename Base::Shared;

  __device__ Attention(const Workspace& workspace, int position, Shared& shared)
      : Base(workspace, position, shared, 0), gather_(shared.gather) {}

  // Leaves the partials of this CTA's cluster in the workspace, of what the tile warps make of its cached tokens; nothing where it
  // has none. True where somebody has to be told: on rank 0 of a cluster. heads_read() comes when q, k and v are there.
  template <bool kWhole, typename HeadsRead>
  __device__ bool attend(const KvCache& cache, int layer, unsigned epoch, HeadsRead heads_read) {
    const bool tells = S::kMerged == 1 || cluster_rank() == 0;
    if (!this->works()) return tells;
    load_heads<kWhole>(cache, layer, epoch);
    heads_read();
    this->signal(kQueriesReady);
    this->block_sync();
    const int used = min(cached_tiles(), S::kWarps);
    int count = used;
    if (split() == 0) {
      if (this->warp_ == S::kVectorWarps - 1) {
#pragma unroll 1
        for (int q = 0; q < kQueries; q++) new_token(this->slots() + used * kPartialsFloats + q * kPartial, s_.query + q * S::kHeadDim);
      }
      count++;
    }
    this->await_of_attended(kPartialsReady);
    SoftmaxScale scale{-kInfinity, 0.0f};
    // Each thread merges one dimension of a head; the scale is the same on all of that head.
    gather_.exchange(this->local_, [&](int at) {  // begins with a barrier: the new token's partial is there
      const int q = kQueries == 1 ? 0 : at / kPartial, i = at - q * kPartial;
      const float value =
          merge_partials<S::kHeadDim, S::kWarps + 1>(this->slots() + q * kPartial, count, kPartialsFloats, i < S::kHeadDim ? i : 0, scale);
      return i < S::kHeadDim ? value : i == S::kHeadDim ? scale.maximum : i == S::kHeadDim + 1 ? scale.sum : 0.0f;
    });
    if (gather_.expired() && thread_ == 0) this->record_error(kOnCluster, 0, 0);
    if (!tells) return false;
    float* to = u_.partials + (bundle() * kQueries * S::kPartials + split() / S::kMerged) * kPartial;
    for (int at = thread_; at < kPartialsFloats; at += S::kVectorThreads) {
      const int q = kQueries == 1 ? 0 : at / kPartial, i = at - q * kPartial;
      const float value = merge_partials<S::kHeadDim, S::kMerged>(
          gather_.result() + q * kPartial, S::kMerged, kPartialsFloats, i < S::kHeadDim ? i : 0, scale);
      to[q * S::kPartials * kPartial + i] =
          i < S::kHeadDim ? value : i == S::kHeadDim ? scale.maximum : i == S::kHeadDim + 1 ? scale.sum : 0.0f;
    }
    this->block_sync();
    return true;
  }

  // The attention's output of all heads, merged from the partials, into shared memory, when the tile warps have done with what
  // is there.
  template <bool kWhole>
  __device__ void load_attention(const SplitVector& to, int layer) {
    constexpr int kQuads = S::kQSize / 4, kOwn = (kQuads + S::kVectorThreads - 1) / S::kVectorThreads;
    // So many loads fit the registers, and cost one trip together: of all quads of a thread, or a few, as many partials each as
    // there are, or a few; of those, all that hold anything. Fewer where few warps have more quads each.
    constexpr int kLoads = S::kVectorWarps < 6 ? 8 : 12, kTogether = kOwn * S::kPartials <= kLoads || kOwn < 4 ? kOwn : 4;
    constexpr int kLoaded = smaller(S::kPartials, larger(kLoads / kTogether, 1));
    const int used = this->used_partials();  // others may hold what an earlier launch left
#pragma unroll
    for (int group = 0; group < kOwn; group += kTogether) {
      const auto quad_of = [&](int i) { return (group + i) * S::kVectorThreads + thread_; };
      const auto mine = [&](int i) { return group + i < kOwn && quad_of(i) < kQuads; };
      float maximum[kTogether], sum[kTogether] = {};
      float4 value[kTogether] = {};
#pragma unroll
      for (int i = 0; i < kTogether; i++) maximum[i] = -kInfinity;
#pragma unroll 1
      for (int first = 0; first < used; first += kLoaded) {
        float4 parts[kTogether][kLoaded] = {};
        float2 scales[kTogether][kLoaded];
#pragma unroll
        for (int i = 0; i < kTogether; i++) {
#pragma unroll
          for (int n = 0; n < kLoaded; n++) {
            scales[i][n] = make_float2(-kInfinity, 0.0f);
            if (!mine(i) || first + n >= used) continue;
            const int of_head = quad_of(i) * 4 / S::kHeadDim, dim = quad_of(i) * 4 % S::kHeadDim;
            const float* from = u_.partials + (of_head * S::kPartials + first + n) * kPartial;
            scales[i][n] = __ldcg(reinterpret_cast<const float2*>(from + S::kHeadDim));
            parts[i][n] = __ldcg(reinterpret_cast<const float4*>(from + dim));
          }
        }
#pragma unroll
        for (int i = 0; i < kTogether; i++) {
          float highest = -kInfinity;
#pragma unroll
          for (int n = 0; n < kLoaded; n++) highest = fmaxf(highest, scales[i][n].x);
          const auto [base, keep] = raise_maximum(maximum[i], highest);
          sum[i] *= keep;
          value[i].x *= keep, value[i].y *= keep, value[i].z *= keep, value[i].w *= keep;
#pragma unroll
          for (int n = 0; n < kLoaded; n++) {
            const float weight = exp2f(scales[i][n].x - base);
            const float4 part = parts[i][n];
            sum[i] = fmaf(weight, scales[i][n].y, sum[i]);
            value[i].x = fmaf(weight, part.x, value[i].x), value[i].y = fmaf(weight, part.y, value[i].y);
            value[i].z = fmaf(weight, part.z, value[i].z), value[i].w = fmaf(weight, part.w, value[i].w);
          }
        }
      }
      if constexpr (kWhole) this->await(kProjected, layer);
#pragma unroll
      for (int i = 0; i < kTogether; i++) {
        if (!mine(i)) continue;
        const float4 v = value[i];
        to.quad(quad_of(i)) = make_float4(v.x / sum[i], v.y / sum[i], v.z / sum[i], v.w / sum[i]);
      }
    }
  }

 private:
  // The bundle's queries, their key and their value: rotated, k and v rounded as the cache holds them; q scaled. The group's first
  // CTA writes the cache.
  template <bool kWhole>
  __device__ void load_heads(const KvCache& cache, int layer, unsigned epoch) {
    const float scale = rsqrtf(static_cast<float>(S::kHeadDim)) * kLog2E;
    // Queries are polled for a few at a time, the key and the value beside all of them: more do not fit the registers.
    constexpr int kRounds = (kQueries + 3) / 4, kTogether = (kQueries + kRounds - 1) / kRounds;
    constexpr int kHalf = S::kRotary / 2, kLoads = 2 * kTogether + 3;
    const int group = kv_head() * S::kGroupRows;
    const int first_query = this->bundle_of_group() * kQueries * S::kHeadDim;
    for (int i = thread_; i < S::kHeadDim; i += S::kVectorThreads) {
      const bool rotates = i < S::kRotary;
      int partner, angle;
      bool second;  // of the two that rotate together
      if constexpr (S::kPairing == Pairing::halves) {
        second = i >= kHalf;
        partner = !rotates ? i : second ? i - kHalf : i + kHalf;
        angle = second ? i - kHalf + u_.second_angles : i;
      } else {
        second = i % 2 == 1;
        partner = !rotates ? i : i ^ 1;
        angle = u_.second_angles == 0 ? i / 2 : i;
      }
      float c = 1.0f, s = 0.0f;
      if (rotates) {
        c = u_.cos[position_ * u_.table_stride + angle];
        s = (second ? 1.0f : -1.0f) * u_.sin[position_ * u_.table_stride + angle];
      }
#pragma unroll 1
      for (int first = 0; first < kQueries; first += kTogether) {
        const auto query = [&](int n) { return min(first + n, kQueries - 1); };
        // Queries, key, value; the partners of queries and key.
        float values[kLoads];
        const auto at = [&](int n) {
          const bool own = n < kTogether + 2;
          const int of = own ? n : n - kTogether - 2, dim = own ? i : partner;
          if (of < kTogether) return group + first_query + query(of) * S::kHeadDim + dim;
          return group + (S::kGroup + of - kTogether) * S::kHeadDim + dim;
        };
        if constexpr (kWhole) {
          const Pair* qkv = static_cast<const Pair*>(u_.qkv);
          Pair pairs[kLoads] = {};
          this->template poll<kLoads>(
              kOnQkv, epoch, [&](int n) { pairs[n] = load_pair(qkv + at(n)); },
              [&](int n) { return epoch_of(pairs[n]) == epoch; });
#pragma unroll
          for (int n = 0; n < kLoads; n++) values[n] = value_of(pairs[n]);
        } else {
#pragma unroll
          for (int n = 0; n < kLoads; n++) values[n] = __ldcg(static_cast<const float*>(u_.qkv) + at(n));
        }
        if (rotates) {
#pragma unroll
          for (int n = 0; n <= kTogether; n++) values[n] = fmaf(values[kTogether + 2 + n], s, __fmul_rn(values[n], c));
        }
#pragma unroll
        for (int n = 0; n < kTogether; n++) s_.query[query(n) * S::kHeadDim + i] = values[n] * scale;
        if (first == 0) store_key_and_value(cache, layer, i, values[kTogether], values[kTogether + 1]);
      }
    }
  }

  // Dimension i of the new token's, as the cache holds them.
  __device__ void store_key_and_value(const KvCache& cache, int layer, int i, float key, float value) {
    const W k_rounded = from_float<W>(key), v_rounded = from_float<W>(value);
    s_.key[i] = to_float(k_rounded);
    s_.value[i] = to_float(v_rounded);
    if (split() != 0 || this->bundle_of_group() != 0) return;
    const int head = kv_head();
    const cuda::std::int64_t to = layer * cache.layer_stride + head * cache.head_stride + position_ * cache.token_stride + i;
    static_cast<W*>(cache.k)[to] = k_rounded;
    static_cast<W*>(cache.v)[to] = v_rounded;
    if (cache.k_new != nullptr) {
      static_cast<W*>(cache.k_new)[head * S::kHeadDim + i] = k_rounded;
      static_cast<W*>(cache.v_new)[head * S::kHeadDim + i] = v_rounded;
    }
  }

  // The current token attends to itself, with one query: one warp.
  __device__ void new_token(float* partial, const float* query) {
    float dot = 0;
    for (int i = lane_; i < S::kHeadDim; i += kWarpSize) dot = fmaf(query[i], s_.key[i], dot);
    dot = warp_sum(dot);
    for (int i = lane_; i < S::kHeadDim; i += kWarpSize) partial[i] = s_.value[i];
    if (lane_ == 0) partial[S::kHeadDim] = dot, partial[S::kHeadDim + 1] = 1.0f;
  }

  typename Base::Gather gather_;
};

}  // namespace clusterfusion
