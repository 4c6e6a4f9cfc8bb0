// Launches that overlap (programmatic dependent launch): the next one on the stream may start while this one still runs.
//
// A launch made without the attribute passes both functions at once. CTAs of the next launch take the places that CTAs of
// this one leave; whatever they do before wait_for_previous_launch must not depend on it, nor disturb it.
#pragma once

namespace clusterfusion {

// Returns when the launch before this one on the stream has ended and all it wrote is visible.
__device__ __forceinline__ void wait_for_previous_launch() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Lets the next launch start once every CTA of this one has been here. Called after wait_for_previous_launch, so that when
// launch n + 1 runs at all, launch n - 1 has ended.
__device__ __forceinline__ void let_next_launch_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

}  // namespace clusterfusion
