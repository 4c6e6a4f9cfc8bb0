// When a CTA passed which point of a layer, as thread 0 saw it. NoTrace takes its place in ordinary launches.
#pragma once

namespace clusterfusion {

// In the order of a layer with parallel residual. The names are those of plan/trace.py.
enum class TraceEvent {
  begin, residual_read, normed, qkv_done, attention_wait, attention_begin, attention_done, up_done, output_wait, output_begin,
  output_done, down_wait, down_begin, down_done, end, data_waited, count
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
  __device__ Trace(long long* record, int layers) : of_cta_(record + static_cast<long long>(blockIdx.x) * (layers + 1) * kTraceEvents) {}
  __device__ void layer(int layer) { at_ = of_cta_ + layer * kTraceEvents; }
  __device__ void mark(TraceEvent event) {
    if (threadIdx.x == 0) record(event, clock64());
  }
  __device__ void record(TraceEvent event, long long value) {
    if (threadIdx.x == 0) at_[static_cast<int>(event)] = value;
  }

 private:
  long long *of_cta_, *at_ = nullptr;
};

}  // namespace clusterfusion
