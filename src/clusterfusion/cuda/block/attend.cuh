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

  // Leaves in the workspace: of a whole layer this CTA's share of the attention's output of its head, as pairs; of a segment
  // the partial of its cluster.
  // head_read() comes when q, k and v are there.
  template <bool kWhole, typename HeadRead>
  __device__ void attend(const KvCache& cache, int layer, unsigned epoch, HeadRead head_read) {
    load_head<kWhole>(cache, layer, epoch);
    head_read();
    pair_.block_sync();
    AttentionWarp<W, Cached> mine(lane_, s_.query);
    int slot = -1;
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
    SoftmaxScale scale{-kInfinity, 0.0f};
    // Each thread merges one dimension; the scale is the same on all of them.
    gather_.exchange(pair_, [&](int i) {
      const float value = merge_partials<S::kHeadDim>(s_.slots, count, kPartial, i < S::kHeadDim ? i : 0, scale);
      return i < S::kHeadDim ? value : i == S::kHeadDim ? scale.maximum : i == S::kHeadDim + 1 ? scale.sum : 0.0f;
    });
    if (pair_.expired() && thread_ == 0) this->record_error(kOnCluster, 0, 0);
    if (S::kMerged > 1 && pair_.rank() != 0) return;
    const int partial = split() / S::kMerged;
    for (int i = thread_; i < S::kHeadDim + 2; i += S::kVectorThreads) {
      const float value = merge_partials<S::kHeadDim>(gather_.result(), S::kMerged, kPartial, i < S::kHeadDim ? i : 0, scale);
      const float own = i < S::kHeadDim ? value : i == S::kHeadDim ? scale.maximum : scale.sum;
      const int at = (head() * S::kPartials + partial) * kPartial + i;
      if constexpr (!kWhole) {
        static_cast<float*>(u_.partials)[at] = own;
      } else if (partial != 0) {
        store_pair(static_cast<Pair*>(u_.partials) + at, own, epoch);
      } else if (i < S::kHeadDim) {
        store_pair(static_cast<Pair*>(u_.attended) + head() * S::kHeadDim + i, merge_head(value, scale, i, epoch), epoch);
      }
    }
  }

  // The attention's output of all heads into shared memory, when the tile warps have done with what is there.
  template <bool kWhole, int kItems>
  __device__ void load_attention(const SplitVector& to, unsigned epoch, int layer) {
    float values[kItems] = {};
    if constexpr (kWhole) {
      read_pairs(*this, static_cast<const Pair*>(u_.attended), epoch, kOnAttention, values);
      this->await(kProjected, layer);
    } else {
      for_my_quads<S>(values, [&](int quad, float* at) {
#pragma unroll
        for (int k = 0; k < 4; k++) at[k] = merged(quad * 4 + k);
      });
    }
    for_my_quads<S>(values, [&](int quad, const float* at) { to.quad(quad) = make_float4(at[0], at[1], at[2], at[3]); });
  }

 private:
  // Element `dim` of the head's output: the first cluster's own partial and, in order, the other clusters', waited for.
  __device__ float merge_head(float own, const SoftmaxScale& scale, int dim, unsigned epoch) {
    constexpr int kOthers = S::kPartials - 1;
    HeadMerge head_merge(own, scale);
    if constexpr (kOthers > 0) {
      constexpr int kTogether = kOthers < 4 ? kOthers : 4;
      const Pair* others = static_cast<const Pair*>(u_.partials) + (head() * S::kPartials + 1) * kPartial;
      float values[kOthers < 64 ? kOthers : 1];
      static_assert(kOthers < 64, "as many as registers hold");
      SoftmaxScale scales[kOthers];
#pragma unroll
      for (int first = 0; first < kOthers; first += kTogether) {
        Pair pairs[kTogether][3] = {};
        this->template poll<kTogether>(
            kOnPartial, epoch,
            [&](int i) {
              if (first + i >= kOthers) return;
              const Pair* other = others + (first + i) * kPartial;
              pairs[i][0] = load_pair(other + dim);
              load_pairs(other + S::kHeadDim, pairs[i][1], pairs[i][2]);
            },
            [&](int i) {
              if (first + i >= kOthers) return true;
              values[first + i] = value_of(pairs[i][0]);
              scales[first + i] = {value_of(pairs[i][1]), value_of(pairs[i][2])};
              return epoch_of(pairs[i][0]) == epoch && epoch_of(pairs[i][1]) == epoch && epoch_of(pairs[i][2]) == epoch;
            });
      }
#pragma unroll
      for (int i = 0; i < kOthers; i++) head_merge.see(scales[i]);
      head_merge.begin();
#pragma unroll
      for (int i = 0; i < kOthers; i++) head_merge.add(values[i], scales[i]);
    } else {
      head_merge.begin();
    }
    return head_merge.result();
  }

  // Element `index` of all heads' output, merged from the partials of a launch before.
  __device__ float merged(int index) const {
    const int of_head = index / S::kHeadDim, dim = index % S::kHeadDim;
    const float* partials = static_cast<const float*>(u_.partials) + of_head * S::kPartials * kPartial;
    const auto scale = [&](int i) {
      return SoftmaxScale{__ldcg(partials + i * kPartial + S::kHeadDim), __ldcg(partials + i * kPartial + S::kHeadDim + 1)};
    };
    HeadMerge head_merge(__ldcg(partials + dim), scale(0));
    for (int i = 1; i < S::kPartials; i++) head_merge.see(scale(i));
    head_merge.begin();
    for (int i = 1; i < S::kPartials; i++) head_merge.add(__ldcg(partials + i * kPartial + dim), scale(i));
    return head_merge.result();
  }

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
