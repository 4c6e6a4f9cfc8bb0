// What a launch of the whole decode step is given.
#pragma once

#include "block/share.cuh"
#include "block/tagged.cuh"
#include "step/choose.cuh"

namespace clusterfusion {

constexpr int kNoToken = -1;  // in place of a token: its logits are not finite

// Device memory that lasts from step to step; zero before first use.
struct StepState {
  unsigned arrivals;  // of CTAs, at the end of a step
  Pair choice;        // the token that the last step chose, below, and above it how many steps there have been
};

// Passed by value: a launch knows its first position and, after a prompt, its first token; nothing has to be fetched first.
template <int kLayers>
struct StepArguments {
  TensorMap k_map, v_map;                              // of the whole caches, as [layers * kv_heads, max_len, head_dim]
  Workspace workspace;
  KvCache cache;
  const void *embedding, *norm_weight, *norm_bias, *lm_head;
  unsigned* marked;                                    // [2, hidden] of ResidualStream
  float* logits;                                       // [vocabulary]
  StepState* state;
  Candidate* candidates;                               // [CTAs]
  int* chosen;                                         // [steps], where the choices go as well: host memory
  long long* trace;                                    // [CTAs, layers + 1, kTraceEvents], then kTraceClocks a CTA; or null
  double temperature;                                  // 0: greedy
  unsigned long long seed;
  int vocabulary;
  int position;                                        // cached tokens before the first step
  int token;                                           // that the first step takes; kNoToken: the one that the last step chose
  unsigned first_step;                                 // steps over this memory before this launch
  int steps;                                           // of this launch
  LayerTensors layers[kLayers];
};
static_assert(sizeof(StepArguments<2>) == 896 && sizeof(Candidate) == 16 && sizeof(StepState) == 16 && sizeof(LayerTensors) == 144, "jit/decode_step.py lays out the same struct");

}  // namespace clusterfusion
