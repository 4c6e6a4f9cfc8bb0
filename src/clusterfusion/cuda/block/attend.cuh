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
    // Nobody polls for q, k and v, which come from CTAs that have as much to do, before this CTA's own of the head group are there.
    if constexpr (kWhole) this->await(kProjected + this->head_group(), layer);
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
    constexpr int kQuads = kPartial / 4;  // of a head
    const auto head_of = [](int at) { return kQueries == 1 ? 0 : at / kQuads; };
    gather_.exchange(this->local_, [&](int at) {  // begins with a barrier: the new token's partial is there
      const int q = head_of(at);
      return merge_partials<S::kHeadDim, S::kWarps + 1>(this->slots() + q * kPartial, count, kPartialsFloats, at - q * kQuads);
    });
    if (gather_.expired() && thread_ == 0) this->record_error(kOnCluster, 0, 0);
    if (!tells) return false;
    float* to = u_.partials + (bundle() * kQueries * S::kPartials + split() / S::kMerged) * kPartial;
    const float* partials = reinterpret_cast<const float*>(gather_.result());
    for (int at = thread_; at < kQueries * kQuads; at += S::kVectorThreads) {
      const int q = head_of(at), quad = at - q * kQuads;
      reinterpret_cast<float4*>(to + q * S::kPartials * kPartial)[quad] =
          merge_partials<S::kHeadDim, S::kMerged>(partials + q * kPartial, S::kMerged, kPartialsFloats, quad);
    }
    this->block_sync();
    return true;
  }

  // The attention's output of the heads of a head group, merged from the partials, into shared memory, when the tile warps have done
  // with what is there.
  template <bool kWhole>
  __device__ void load_attention(const SplitVector& to, int layer, int group) {
    constexpr int kQuads = S::kGroupQSize / 4, kOfHead = S::kHeadDim / 4, kOwn = (kQuads + S::kVectorThreads - 1) / S::kVectorThreads;
    // A thread's quads are of one head, whose scales it needs once.
    constexpr int kTogether = kOwn == 1 ? 1 : kOwn == 2 || kOfHead % 4 != 0 ? 2 : 4;
    constexpr int kApart = kOfHead / kTogether;
    // So many loads fit the registers, and cost one trip together: of all quads, and of as many partials as there are, or a few; of those,
    // all that hold anything.
    constexpr int kLoads = S::kVectorWarps < 6 ? 12 : 16, kLoaded = smaller(S::kPartials, kLoads / kTogether);
    const int used = this->used_partials();  // others may hold what an earlier launch left
#pragma unroll 1
    for (int mine = thread_; mine < kQuads / kTogether; mine += S::kVectorThreads) {
      const int head = group * (S::kHeads / S::kHeadGroups) + mine / kApart, quad = mine % kApart;  // and every kApart-th quad of the head from there on
      const float* partials = u_.partials + head * S::kPartials * kPartial;
      float maximum = -kInfinity, sum = 0;
      float4 value[kTogether] = {};
#pragma unroll 1
      for (int first = 0; first < used; first += kLoaded) {
        float4 parts[kLoaded][kTogether] = {};
        float2 scales[kLoaded];
#pragma unroll
        for (int n = 0; n < kLoaded; n++) {
          scales[n] = make_float2(-kInfinity, 0.0f);
          if (first + n >= used) continue;
          const float* from = partials + (first + n) * kPartial;
          scales[n] = __ldcg(reinterpret_cast<const float2*>(from + S::kHeadDim));
#pragma unroll
          for (int i = 0; i < kTogether; i++) parts[n][i] = __ldcg(reinterpret_cast<const float4*>(from) + quad + i * kApart);
        }
        float highest = -kInfinity;
#pragma unroll
        for (int n = 0; n < kLoaded; n++) highest = fmaxf(highest, scales[n].x);
        const auto [base, keep] = raise_maximum(maximum, highest);
        sum *= keep;
#pragma unroll
        for (float4& v : value) v.x *= keep, v.y *= keep, v.z *= keep, v.w *= keep;
#pragma unroll
        for (int n = 0; n < kLoaded; n++) {
          const float weight = exp2f(scales[n].x - base);
          sum = fmaf(weight, scales[n].y, sum);
#pragma unroll
          for (int i = 0; i < kTogether; i++) {
            const float4 part = parts[n][i];
            float4& v = value[i];
            v.x = fmaf(weight, part.x, v.x), v.y = fmaf(weight, part.y, v.y);
            v.z = fmaf(weight, part.z, v.z), v.w = fmaf(weight, part.w, v.w);
          }
        }
      }
      if constexpr (kWhole) {  // the last one's is behind the others', but a signal that is given is awaited
#pragma unroll
        for (int projected = 0; projected < S::kHeadGroups; projected++) this->await(kProjected + projected, layer);
      }
#pragma unroll
      for (int i = 0; i < kTogether; i++) {
        const float4 v = value[i];
        to.quad(head * kOfHead + quad + i * kApart) = make_float4(v.x / sum, v.y / sum, v.z / sum, v.w / sum);
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
