// The attention phase, on the vector warps: this CTA's part of its head, merged over the cluster, then over the head's clusters.
#pragma once

#include "block/residual.cuh"

namespace clusterfusion {

template <typename S>
class Attention : public CtaState<S> {
 protected:
  using Base = CtaState<S>;
  using typename Base::Cached;
  using typename Base::W;
  using Base::cached_tiles;
  using Base::head;
  using Base::kPartial;
  using Base::lane_;
  using Base::position_;
  using Base::s_;
  using Base::split;
  using Base::thread_;
  using Base::u_;

 public:
  using typename Base::Shared;

  __device__ Attention(const Workspace& workspace, const TensorMap& k_map, const TensorMap& v_map, int position, Shared& shared)
      : Base(workspace, position, shared, 0), k_map_(k_map), v_map_(v_map),
        tiles_(shared.cache_stages, shared.cache_barriers, this->warp_, lane_), pair_(shared.pair), gather_(shared.gather) {}

  // Asks for the first cached tokens of a layer: ahead of the dependency on q, k and v.
  __device__ void fetch_ahead(int layer) { tiles_.begin(cached_tiles(), fetcher(layer)); }

  // Leaves the partial of this CTA's cluster in the workspace. True where somebody has to be told: on rank 0 of a cluster.
  // head_read() comes when q, k and v are there.
  template <bool kWhole, typename HeadRead>
  __device__ bool attend(const KvCache& cache, int layer, unsigned epoch, HeadRead head_read) {
    load_head<kWhole>(cache, layer, epoch);
    head_read();
    pair_.block_sync();
    AttentionWarp<W, Cached> mine(lane_, s_.query);
    int slot = -1;
    const bool waits = cached_tiles() > S::kCacheStages;  // for more than what has been asked for ahead
    if (waits && thread_ == 0) mbarrier_arrive_local(&s_.cache_turns);
    tiles_.tiles(cached_tiles(), fetcher(layer), [&](int tile, const char* data) {
      mine.add_tile(data, this->tile_tokens(tile));
      slot = tile % S::kVectorWarps;
    });
    const int used = min(cached_tiles(), S::kVectorWarps);
    if (slot >= 0) mine.store(s_.slots + slot * kPartial);
    int count = used;
    if (split() == 0) {
      if (this->warp_ == S::kVectorWarps - 1) new_token(s_.slots + used * kPartial);
      count++;
    }
    pair_.block_sync();
    if (waits && thread_ == 0) mbarrier_arrive_local(&s_.cache_turns);
    SoftmaxScale scale{-kInfinity, 0.0f};
    // Each thread merges one dimension; the scale is the same on all of them.
    gather_.exchange(pair_, [&](int i) {
      const float value = merge_partials<S::kHeadDim>(s_.slots, count, kPartial, i < S::kHeadDim ? i : 0, scale);
      return i < S::kHeadDim ? value : i == S::kHeadDim ? scale.maximum : i == S::kHeadDim + 1 ? scale.sum : 0.0f;
    });
    if (pair_.expired() && thread_ == 0) this->record_error(kOnCluster, 0, 0);
    if (S::kMerged > 1 && pair_.rank() != 0) return false;
    float* to = u_.partials + (head() * S::kPartials + split() / S::kMerged) * kPartial;
    for (int i = thread_; i < kPartial; i += S::kVectorThreads) {
      const float value = merge_partials<S::kHeadDim>(gather_.result(), S::kMerged, kPartial, i < S::kHeadDim ? i : 0, scale);
      to[i] = i < S::kHeadDim ? value : i == S::kHeadDim ? scale.maximum : i == S::kHeadDim + 1 ? scale.sum : 0.0f;
    }
    pair_.block_sync();
    return true;
  }

  // The attention's output of all heads, merged from the partials, into shared memory, when the tile warps have done with what
  // is there.
  template <bool kWhole, int kItems>
  __device__ void load_attention(const SplitVector& to, int layer) {
    constexpr int kQuads = kItems / 4, kPartials = S::kPartials;
    constexpr bool kAtOnce = kQuads * kPartials <= 12;  // that many loads fit the registers, and cost one trip together
    constexpr int kTogether = kAtOnce ? kQuads : 1;
#pragma unroll
    for (int first = 0; first < kQuads; first += kTogether) {
      float4 parts[kTogether][kPartials] = {};
      float2 scales[kTogether][kPartials] = {};
      const auto quad_of = [&](int i) { return (first + i) * S::kVectorThreads + thread_; };
#pragma unroll
      for (int i = 0; i < kTogether; i++) {
        if (quad_of(i) >= S::kHidden / 4) continue;
        const int of_head = quad_of(i) * 4 / S::kHeadDim, dim = quad_of(i) * 4 % S::kHeadDim;
        const float* partials = u_.partials + of_head * kPartials * kPartial;
#pragma unroll
        for (int n = 0; n < kPartials; n++) {
          scales[i][n] = __ldcg(reinterpret_cast<const float2*>(partials + n * kPartial + S::kHeadDim));
          parts[i][n] = __ldcg(reinterpret_cast<const float4*>(partials + n * kPartial + dim));
        }
      }
      if constexpr (kWhole) this->await(kProjected, layer);
#pragma unroll
      for (int i = 0; i < kTogether; i++) {
        if (quad_of(i) >= S::kHidden / 4) continue;
        float maximum = -kInfinity, sum = 0;
#pragma unroll
        for (int n = 0; n < kPartials; n++) maximum = fmaxf(maximum, scales[i][n].x);
        float4 value = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int n = 0; n < kPartials; n++) {
          const float weight = scales[i][n].x == -kInfinity ? 0.0f : exp2f(scales[i][n].x - maximum);
          const float4 part = parts[i][n];
          sum = fmaf(weight, scales[i][n].y, sum);
          value.x = fmaf(weight, part.x, value.x), value.y = fmaf(weight, part.y, value.y);
          value.z = fmaf(weight, part.z, value.z), value.w = fmaf(weight, part.w, value.w);
        }
        to.quad(quad_of(i)) = make_float4(value.x / sum, value.y / sum, value.z / sum, value.w / sum);
      }
    }
  }

 private:
  // q, k and v of this CTA's head: rotated, k and v rounded as the cache holds them; q scaled. Split 0 writes the cache.
  template <bool kWhole>
  __device__ void load_head(const KvCache& cache, int layer, unsigned epoch) {
    const float scale = rsqrtf(static_cast<float>(S::kHeadDim)) * kLog2E;
    constexpr int kHalf = S::kRotary / 2;
    const int first = head() * 3 * S::kHeadDim;
    for (int i = thread_; i < S::kHeadDim; i += S::kVectorThreads) {
      const bool rotates = i < S::kRotary;
      const int partner = !rotates ? i : i < kHalf ? i + kHalf : i - kHalf;
      float c = 1.0f, s = 0.0f;
      if (rotates) {
        const int angle = i < kHalf ? i : i - kHalf + u_.second_angles;
        c = u_.cos[position_ * u_.table_stride + angle];
        s = (i < kHalf ? -1.0f : 1.0f) * u_.sin[position_ * u_.table_stride + angle];
      }
      float q, k, v, q_partner, k_partner;
      if constexpr (kWhole) {
        const Pair* qkv = static_cast<const Pair*>(u_.qkv) + first;
        const int at[5] = {i, S::kHeadDim + i, 2 * S::kHeadDim + i, partner, S::kHeadDim + partner};
        Pair pairs[5] = {};
        this->template poll<5>(
            kOnQkv, epoch, [&](int n) { pairs[n] = load_pair(qkv + at[n]); },
            [&](int n) { return epoch_of(pairs[n]) == epoch; });
        q = value_of(pairs[0]), k = value_of(pairs[1]), v = value_of(pairs[2]);
        q_partner = value_of(pairs[3]), k_partner = value_of(pairs[4]);
      } else {
        const float* qkv = static_cast<const float*>(u_.qkv) + first;
        q = __ldcg(qkv + i), k = __ldcg(qkv + S::kHeadDim + i), v = __ldcg(qkv + 2 * S::kHeadDim + i);
        q_partner = __ldcg(qkv + partner), k_partner = __ldcg(qkv + S::kHeadDim + partner);
      }
      if (rotates) {
        q = fmaf(q_partner, s, __fmul_rn(q, c));
        k = fmaf(k_partner, s, __fmul_rn(k, c));
      }
      const W k_rounded = from_float<W>(k), v_rounded = from_float<W>(v);
      s_.query[i] = q * scale;
      s_.key[i] = to_float(k_rounded);
      s_.value[i] = to_float(v_rounded);
      if (split() == 0) {
        const cuda::std::int64_t at = layer * cache.layer_stride + head() * cache.head_stride + position_ * cache.token_stride + i;
        static_cast<W*>(cache.k)[at] = k_rounded;
        static_cast<W*>(cache.v)[at] = v_rounded;
        if (cache.k_new != nullptr) {
          static_cast<W*>(cache.k_new)[head() * S::kHeadDim + i] = k_rounded;
          static_cast<W*>(cache.v_new)[head() * S::kHeadDim + i] = v_rounded;
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

  // Whole tiles: of the last one, what lies beyond the position is copied and never looked at.
  __device__ auto fetcher(int layer) const {
    return [this, first_head = layer * S::kHeads](int tile, char* to, cuda::std::uint64_t* barrier) {
      const int token = (split() + tile * S::kSplits) * Cached::kTokens;
      tensor_copy(to, &k_map_, 0, token, first_head + head(), barrier);
      tensor_copy(to + Cached::kValuesAt, &v_map_, 0, token, first_head + head(), barrier);
    };
  }

  const TensorMap &k_map_, &v_map_;
  OwnTiles<typename Base::CacheStages, 2 * Cached::kHalfBytes> tiles_;
  typename Base::PairTeam pair_;
  typename Base::Gather gather_;
};

}  // namespace clusterfusion
