"""Decode steps, several to a launch: the mode model.

A launch takes its first position, and the first one of a stream its token, by value; every later step finds the token that the one
before it chose in device memory. So the host launches ahead and reads the choices back behind.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from clusterfusion import reference
from clusterfusion.engine.block_decoder import rotary_tables
from clusterfusion.errors import ArgumentError, DeviceError, UnsupportedModelError
from clusterfusion.jit.decode_step import (
    CANDIDATE_WORDS,
    NO_FAULT,
    NO_TOKEN,
    STATE_WORDS,
    prepare_step,
    step_arguments_type,
)
from clusterfusion.jit.decoder_block import cache_map
from clusterfusion.ops.layer_launch import (
    ELEMENT_TYPES,
    ErrorRecord,
    LayerScratch,
    address,
    kv_cache,
    layer_tensors,
    plan_for,
    require_streamable_cache,
    workspace,
)
from clusterfusion.plan import BlockPlan
from clusterfusion.weights import DecoderWeights

MOST_STEPS = 8  # of a launch: between its steps the stream of weights goes on
LAUNCHES = 2  # under way at once: the next one waits on the GPU while this one runs


class StepDecoder:
    """Runs steps over one K/V cache, which it shares with its session. Its buffers belong to it alone, and to the stream
    that its steps run on: whoever steps on several streams orders them, and lets the last end before it is dropped.

    Device memory beside weights and cache: `plan.scratch_bytes`, the residual vector twice, the
    rotary tables [max_len, rotary_dim / 2], the logits, 16 bytes a CTA, and 20.
    """

    @torch.inference_mode(False)  # its buffers are written in place later, in whatever mode the caller is in then
    def __init__(
        self,
        weights: DecoderWeights,
        cache: reference.KVCache,
        *,
        plan: BlockPlan | None = None,
        trace: Tensor | None = None,
        fault_cta: int = NO_FAULT,
    ) -> None:
        """`trace`, of plan.trace's shape, int64 on the GPU, takes the events of the last launch; `fault_cta` is for tests."""
        config, device = weights.config, weights.device
        self.plan = plan or plan_for(config, device.index)
        self._weights, self._cache, self._trace = weights, cache, trace
        self._tables = rotary_tables(config, cache.max_len, device)
        self._scratch = LayerScratch(self.plan, weights.dtype, device)
        self._error = ErrorRecord()
        self._marked = torch.zeros(2, config.hidden_size, dtype=torch.int32, device=device)
        self._state = torch.zeros(STATE_WORDS, dtype=torch.int32, device=device)
        self._candidates = torch.zeros(self.plan.ctas, CANDIDATE_WORDS, dtype=torch.int32, device=device)
        self._logits = torch.empty(config.vocab_size, dtype=torch.float32, device=device)
        self._chosen = torch.zeros(LAUNCHES, MOST_STEPS, dtype=torch.int32, device="cpu", pin_memory=True)
        self._choices = self._chosen.numpy()
        self._void = torch.zeros(1, dtype=torch.int32, device=device)  # takes choices that nobody reads
        self._turn = 0  # of steps and streams: who goes on must be the last who began
        self._interrupted = False
        self._events = [torch.cuda.Event() for _ in range(LAUNCHES)]
        self._arguments = self._make_arguments()
        self._launch_step = prepare_step(
            self.plan,
            ELEMENT_TYPES[weights.dtype],
            self._arguments,
            device.index,
            trace=trace is not None,
            fault_cta=fault_cta,
        )

    def step(self, token: int, position: int) -> Tensor:
        """Logits [vocab], float32, after `token` at `position`; its keys and values go into the cache.

        Raises DeviceError when an earlier step of this decoder failed on the GPU. Ends a stream that is not exhausted: its
        next token raises ArgumentError.
        """
        self._turn += 1
        self.check_error()
        self._launch(token, position, self._void.data_ptr())
        with torch.cuda.device(self._weights.device), torch.inference_mode(False), torch.no_grad():
            return self._logits.clone()

    def stream(
        self, token: int, position: int, steps: int, temperature: float = 0.0, seed: int = 0
    ) -> Generator[int, None, None]:
        """The tokens that follow `token`, which stands at `position`: `steps` of them, each chosen on the GPU.

        The first launch is of one step, each later one of twice as many as the last, up to MOST_STEPS; LAUNCHES are under way
        at once. What they leave in the cache past the token that was asked for, and at most there, is void. All of them are
        on the stream that is current at the first, and none is under way any more when the generator has ended or was closed.
        Raises DeviceError for a step that failed, and for logits that are not finite; ArgumentError when the decoder has gone
        on by other means since the last token.
        """
        self._turn += 1
        mine = self._turn
        on = torch.cuda.current_stream(self._weights.device)
        flying: collections.deque[tuple[int, int]] = collections.deque()  # slots, and how many steps
        launched, count = 0, 1
        slots = itertools.cycle(range(LAUNCHES))
        try:
            while True:
                while launched < steps and len(flying) < LAUNCHES:
                    self.check_error()
                    slot, count = next(slots), min(count, steps - launched)
                    first = token if launched == 0 else NO_TOKEN
                    with torch.cuda.stream(on):
                        choices = self._chosen[slot].data_ptr()
                        self._launch(first, position + launched, choices, temperature, seed, steps=count)
                    self._events[slot].record(on)
                    flying.append((slot, count))
                    launched, count = launched + count, min(2 * count, MOST_STEPS)
                if not flying:
                    return
                slot, made = flying.popleft()
                self._events[slot].synchronize()
                self.check_error()
                for chosen in self._choices[slot, :made].tolist():
                    if chosen == NO_TOKEN:
                        raise DeviceError(
                            "the model's logits are not finite: its activations overflow the dtype; load it with "
                            "dtype='bfloat16' or 'float32'"
                        )
                    yield chosen
                    if self._turn != mine:
                        raise ArgumentError("the decoder has gone on by other means since this stream's last token")
        finally:
            # Whoever uses the cache next, on whatever stream, must not meet them; and the choices lie in host memory, which
            # is free for others when this decoder is dropped.
            if flying and self._turn == mine:
                self._events[flying[-1][0]].synchronize()
            elif flying:
                on.synchronize()

    def _launch(
        self, token: int, position: int, choices: int, temperature: float = 0.0, seed: int = 0, *, steps: int = 1
    ) -> None:
        """`choices`: address of the ints that take the chosen tokens, on the device or in page-locked memory."""
        if torch.cuda.is_current_stream_capturing():
            raise ArgumentError(
                "a step of mode 'model' cannot be captured in a CUDA graph: every launch has a number of its own"
            )
        a = self._arguments
        a.token, a.position, a.temperature, a.seed, a.chosen = token, position, temperature, seed, choices
        a.steps = steps
        self._interrupted = True  # should an exception come between the launch and the count of it
        try:
            self._launch_step()
        except DeviceError:
            self._interrupted = False  # refused: nothing was launched
            raise
        a.first_step = (a.first_step + steps) & 0xFFFFFFFF
        self._interrupted = False

    def _make_arguments(self) -> Any:
        weights, c = self._weights, self._weights.config
        k, v = self._cache.k, self._cache.v
        if not (k.is_contiguous() and v.is_contiguous()):
            raise UnsupportedModelError(
                f"a K/V cache of strides {k.stride()} cannot be streamed as one: it must be dense"
            )
        dtype = ELEMENT_TYPES[weights.dtype]
        require_streamable_cache(k[0], v[0])
        return step_arguments_type(c.num_layers)(
            k_map=cache_map(self.plan, dtype, k.flatten(0, 1)),
            v_map=cache_map(self.plan, dtype, v.flatten(0, 1)),
            workspace=workspace(self.plan, self._tables, self._scratch, self._error),
            cache=kv_cache(k, v),
            embedding=address("embedding", weights.embedding),
            norm_weight=address("final_norm_weight", weights.final_norm_weight),
            norm_bias=address("final_norm_bias", weights.final_norm_bias),
            lm_head=address("lm_head", weights.lm_head),
            marked=self._marked.data_ptr(),
            logits=self._logits.data_ptr(),
            state=self._state.data_ptr(),
            candidates=self._candidates.data_ptr(),
            trace=None if self._trace is None else self._trace.data_ptr(),
            vocabulary=c.vocab_size,
            layers=tuple(layer_tensors(layer) for layer in weights.layers),
        )

    def check_error(self) -> None:
        """Raise DeviceError if a step that has ended on the GPU gave up waiting, or the host was interrupted while it
        launched one. Costs nothing but a look."""
        if self._interrupted:
            raise DeviceError("a launch was interrupted, and whether it ran is not known. Make a new session")
        self._error.check("Make a new session")
