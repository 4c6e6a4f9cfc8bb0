// The attention phase, on the vector warps: this CTA's part of its head, merged over the cluster; and the merge of all heads
// by who reads them.
#pragma once

#include "block/cta.cuh"

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
  using Base::u_;

 public:
  using typename Base::Shared;

  __device__ Attention(const Workspace& workspace, const TensorMap& k_map, const TensorMap& v_map, int position, Shared& shared)
      : Base(workspace, position, shared, 0), k_map_(k_map), v_map_(v_map),
        tiles_(shared.cache_stages, shared.cache_barriers, this->warp_, lane_), pair_(shared.pair), gather_(shared.gather) {}

  // Asks for the first cached tokens of a layer: ahead of the dependency on q, k and v.
  __device__ void fetch_ahead(int layer) { tiles_.begin(cached_tiles(), fetcher(layer)); }

  // Leaves the partial of this CTA's cluster in the workspace. True where somebody has to be told: on rank 0 of a cluster.
  __device__ bool attend(const KvCache& cache, int layer) {
    load_head(cache, layer);
    pair_.block_sync();
    AttentionWarp<W, Cached> mine(lane_, s_.query);
    int slot = -1;
    tiles_.tiles(cached_tiles(), fetcher(layer), [&](int tile, const char* data) {
      mine.add_tile(data, this->tile_tokens(tile));
      slot = tile % S::kVectorWarps;
    });
    // Slots without a tile: a warp's own number cannot be used, since it depends on what ran before.
    const int used = min(cached_tiles(), S::kVectorWarps);
    if (slot >= 0) mine.store(s_.slots + slot * kPartial);
    int count = used;
    if (split() == 0) {
      if (this->warp_ == 0) new_token(s_.slots + used * kPartial);
      count++;
    }
    pair_.block_sync();
    SoftmaxScale scale{-kInfinity, 0.0f};
    // Each thread merges one dimension; the scale is the same on all of them.
    gather_.exchange(pair_, [&](int i) {
      const float value = merge_partials<S::kHeadDim>(s_.slots, count, kPartial, i < S::kHeadDim ? i : 0, scale);
      return i < S::kHeadDim ? value : i == S::kHeadDim ? scale.maximum : i == S::kHeadDim + 1 ? scale.sum : 0.0f;
    });
    const bool writes = S::kMerged == 1 || pair_.rank() == 0;
    if (writes) {
      float* to = u_.partials + (head() * S::kPartials + split() / S::kMerged) * kPartial;
      for (int i = this->thread_; i < kPartial; i += S::kVectorThreads) {
        const float value = merge_partials<S::kHeadDim>(gather_.result(), S::kMerged, kPartial, i < S::kHeadDim ? i : 0, scale);
        to[i] = i < S::kHeadDim ? value : i == S::kHeadDim ? scale.maximum : i == S::kHeadDim + 1 ? scale.sum : 0.0f;
      }
      pair_.block_sync();
    }
    if (pair_.expired() && this->thread_ == 0) this->record_error(kClusterDependency, 0, 0);
    return writes;
  }

  // The attention's output of all heads, merged from the partials, into shared memory.
  __device__ void load_attention(const SplitVector& to) {
    for (int quad = this->thread_; quad < S::kHidden / 4; quad += S::kVectorThreads) {
      const int h = quad * 4 / S::kHeadDim, dim = quad * 4 % S::kHeadDim;
      const float* partials = u_.partials + h * S::kPartials * kPartial;
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

 private:
  // q, k and v of this CTA's head: rotated, k and v rounded as the cache holds them; q scaled. Split 0 writes the cache.
  __device__ void load_head(const KvCache& cache, int layer) {
    const float* qkv = u_.qkv + head() * 3 * S::kHeadDim;
    const float scale = rsqrtf(static_cast<float>(S::kHeadDim)) * kLog2E;
    constexpr int kHalf = S::kRotary / 2;
    for (int i = this->thread_; i < S::kHeadDim; i += S::kVectorThreads) {
      float q = __ldcg(qkv + i), k = __ldcg(qkv + S::kHeadDim + i);
      const float v = __ldcg(qkv + 2 * S::kHeadDim + i);
      if (i < S::kRotary) {
        const int pair = i < kHalf ? i + kHalf : i - kHalf, angle = i < kHalf ? i : i - kHalf + u_.second_angles;
        const float sign = i < kHalf ? -1.0f : 1.0f;
        const float c = u_.cos[position_ * u_.table_stride + angle], s = sign * u_.sin[position_ * u_.table_stride + angle];
        q = q * c + __ldcg(qkv + pair) * s;
        k = k * c + __ldcg(qkv + S::kHeadDim + pair) * s;
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
