"""One stream of tokens: a K/V cache, a position, and the two ways forward, prefill and step."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from clusterfusion import reference
from clusterfusion.arguments import as_int
from clusterfusion.errors import ArgumentError, ContextLengthError
from clusterfusion.weights import DecoderWeights

if TYPE_CHECKING:
    from clusterfusion.engine.block_decoder import BlockDecoder
    from clusterfusion.engine.prefill import Prefill
    from clusterfusion.engine.sampling import Sampler
    from clusterfusion.engine.step_decoder import StepDecoder


class Session:
    """A decoding state over shared weights. Sessions are independent of each other.

    `position` tokens are cached. A call that raises leaves the session as it was. Not safe for several threads at once.
    """

    def __init__(self, weights: DecoderWeights, max_seq_len: int, mode: str = "reference") -> None:
        self._weights = weights
        self._mode = mode
        # Made at the first step and the first prompt, over this session's cache.
        self._decoder: BlockDecoder | StepDecoder | None = None
        self._prefill: Prefill | None = None
        self._cache = reference.KVCache.allocate(weights.config, max_seq_len, weights.dtype, weights.device)
        self._position = 0

    @property
    def position(self) -> int:
        """How many tokens are cached; the next one stands here."""
        return self._position

    @property
    def max_seq_len(self) -> int:
        """How many tokens the session has room for."""
        return self._cache.max_len

    @property
    def cache(self) -> reference.KVCache:
        """Keys and values, [layers, kv_heads, max_seq_len, head_dim] each; the first `position` entries are valid."""
        return self._cache

    def prefill(self, ids: Sequence[int] | Tensor) -> Tensor:
        """Take in several tokens after those already cached. Returns the logits [vocab] of the last one, float32
        (float64 for float64 weights).

        `ids` is a list of ints or a 1-D integer tensor on any device, at least one token. Raises ArgumentError for ids
        outside the vocabulary or of another form, ContextLengthError when they do not fit.
        """
        return self._forward(check_token_ids(ids, self._weights.config.vocab_size))

    def prefill_all(self, ids: Sequence[int] | Tensor) -> Tensor:
        """As `prefill`, but returns the logits after every token of `ids` [T, vocab]: what a text's perplexity takes."""
        return self._forward(check_token_ids(ids, self._weights.config.vocab_size), last_only=False)

    def step(self, token: int) -> Tensor:
        """Take in one token. Returns its logits [vocab]. Raises as `prefill` does."""
        token = as_int("token", token, 0, self._weights.config.vocab_size - 1)
        return self._forward(torch.tensor([token]))

    def decode(self, token: int, count: int, sampler: Sampler) -> Generator[int, None, None]:
        """The `count` tokens that follow `token`, which is the next one to take in. Each is taken in before the one after it
        comes; the last one is not. In mode "model" the GPU chooses, where it can (`SamplingOptions.on_device`), and runs
        ahead; what it computed past the last token that was asked for is void, and the session may not go on by other means
        between two tokens (ArgumentError at the next). Raises as `step` and `Sampler.choose` do.
        """
        if self._mode != "model" or not sampler.options.on_device:
            for _ in range(count):
                logits = self.step(token)
                token = sampler.choose(logits, self._position)
                self.check()  # choosing has waited for the step, so a failed one is seen before its token is used
                yield token
            return
        token = as_int("token", token, 0, self._weights.config.vocab_size - 1)
        decoder = cast("StepDecoder", self._own_decoder())
        position, room = self._position, self.max_seq_len - self._position
        options = sampler.options
        following = decoder.stream(token, position, min(count, room), options.temperature, sampler.seed)
        with contextlib.closing(following):
            for chosen in following:
                if self._position != position:
                    raise ArgumentError(
                        f"the session stands at {self._position}, and this decode at {position}: between two of its tokens "
                        "the session must not go on by other means"
                    )
                position += 1
                self._position = position
                yield chosen
        if count > room:
            self._require_room(1)

    def check(self) -> None:
        """Raise DeviceError if a step that has ended on the GPU failed. `step` looks too, for the steps before it."""
        if self._decoder is not None:
            self._decoder.check_error()

    def reset(self) -> None:
        """Forget all tokens."""
        self._position = 0

    def rewind(self, position: int) -> None:
        """Forget the tokens from `position` on. Raises ArgumentError unless 0 <= position <= self.position."""
        self._position = as_int("position", position, 0, self._position)

    def fork(self) -> Session:
        """A second session that goes on from here by itself. Copies the cached tokens' keys and values."""
        twin = Session(self._weights, self.max_seq_len, self._mode)
        twin._cache.k[:, :, : self._position] = self._cache.k[:, :, : self._position]
        twin._cache.v[:, :, : self._position] = self._cache.v[:, :, : self._position]
        twin._position = self._position
        return twin

    def _forward(self, ids: Tensor, *, last_only: bool = True) -> Tensor:
        self._require_room(len(ids))
        if self._mode == "reference":
            place = ids.to(self._weights.device)
            logits = reference.forward(self._weights, place, self._cache, self._position, last_only=last_only)
        elif len(ids) == 1:
            logits = self._own_decoder().step(int(ids), self._position)
            logits = logits if last_only else logits[None]
        else:
            logits = self._own_prefill().run(ids.to(self._weights.device), self._position, last_only=last_only)
        self._position += len(ids)
        return logits

    def _own_prefill(self) -> Prefill:
        if self._prefill is None:
            from clusterfusion.engine.prefill import Prefill

            self._prefill = Prefill(self._weights, self._cache)
        return self._prefill

    def _require_room(self, tokens: int) -> None:
        end = self._position + tokens
        if end > self.max_seq_len:
            raise ContextLengthError(
                f"{tokens} tokens after {self._position} make {end}; this session has room for {self.max_seq_len} "
                "(rewind, reset, or load with a larger max_seq_len if the model allows it)"
            )

    def _own_decoder(self) -> BlockDecoder | StepDecoder:
        if self._decoder is None:
            if self._mode == "model":
                from clusterfusion.engine.step_decoder import StepDecoder

                self._decoder = StepDecoder(self._weights, self._cache)
            else:
                from clusterfusion.engine.block_decoder import BlockDecoder

                self._decoder = BlockDecoder(self._weights, self._cache, self._mode)
        return self._decoder


def check_token_ids(ids: Sequence[int] | Tensor, vocab_size: int) -> Tensor:
    """`ids` as a 1-D int64 tensor. Raises ArgumentError naming the first bad one."""
    if hasattr(ids, "__array__") and not isinstance(ids, Tensor):
        ids = _array_items(ids)
    if isinstance(ids, Tensor):
        integral = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
        if ids.dim() != 1 or not integral or ids.layout != torch.strided or ids.is_meta:
            raise ArgumentError(
                f"ids is a {ids.dim()}-D tensor of {ids.dtype} ({ids.layout}, {ids.device.type}); "
                "it must be a dense 1-D integer tensor with values"
            )
        tensor = ids.detach().to(torch.int64)
    else:
        if isinstance(ids, (str, bytes)) or not isinstance(ids, Sequence):
            raise ArgumentError(f"ids is {type(ids).__name__}; it must be a list of ints or a 1-D integer tensor")
        if set(map(type, ids)) != {int} or not 0 <= min(ids) <= max(ids) < vocab_size:
            # Item by item only where one of them may be wrong: 0.5 ms for 2,048 good ones.
            ids = [as_int(f"ids[{index}]", token, 0, vocab_size - 1) for index, token in enumerate(ids)]
        tensor = torch.tensor(list(ids), dtype=torch.int64)
    if not len(tensor):
        raise ArgumentError("ids is empty; it must hold at least one token")
    low, high = (int(bound) for bound in torch.aminmax(tensor))
    if low < 0 or high >= vocab_size:
        raise ArgumentError(f"ids holds {low if low < 0 else high}; every id must be from 0 to {vocab_size - 1}")
    return tensor


def _array_items(array: object) -> list[int]:
    """The items of a 1-D integer NumPy array of any byte order and stride, or of objects that may be integers."""
    values = np.asarray(array)
    if values.ndim != 1 or values.dtype.kind not in "iuO":
        raise ArgumentError(f"ids is a {values.ndim}-D array of {values.dtype}; it must be a 1-D array of integers")
    return list(values.tolist())
