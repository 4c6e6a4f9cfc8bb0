// When a CTA passed which point of a layer, as the first thread of a role saw it. NoTrace takes its place in ordinary launches.
#pragma once

#include "block/share.cuh"

namespace clusterfusion {

// The order of plan/trace.py: vector warps' events, tile warps' events, and durations: a tile warp's waits for data, and the
// producer's for room in the ring.
enum class TraceEvent {
  begin, residual_read, normed, attention_wait, attention_begin, attention_done, output_wait, output_begin, output_ready,
  down_wait, down_begin, down_ready, sums_wait, published,
  project_wait, project_begin, qkv_done, up_done, cached_wait, cached_begin, cached_done, o_wait, o_begin, o_done, down_tiles_wait, down_tiles_begin, down_tiles_done,
  logits_done,
  data_waited, room_waited, count
};
constexpr int kTraceEvents = static_cast<int>(TraceEvent::count);

struct NoTrace {
  static constexpr bool kOn = false;
  __device__ void layer(int) {}
  __device__ void mark(TraceEvent) {}
  __device__ void record(TraceEvent, long long) {}
};

// Clocks of this multiprocessor. `record` has room for [CTAs, layers + 1, kTraceEvents]; the last layer is the LM head.
class Trace {
 public:
  static constexpr bool kOn = true;
  __device__ Trace(long long* record, int layers, unsigned first_thread)
      : record_(record), layers_(layers), records_(threadIdx.x == first_thread) {}
  __device__ void layer(int layer) { at_ = (opaque(blockIdx.x) * (layers_ + 1) + layer) * kTraceEvents; }
  __device__ void mark(TraceEvent event) {
    if (records_) record(event, clock64());
  }
  __device__ void record(TraceEvent event, long long value) {
    if (records_) record_[at_ + static_cast<unsigned>(event)] = value;
  }

 private:
  long long* record_;
  int layers_;
  unsigned at_ = 0;  // in the record; an address would take another register
  bool records_;
};

}  // namespace clusterfusion
