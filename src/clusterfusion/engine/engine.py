"""A loaded decoder that generates: whole answers, streams of text, or token-by-token sessions."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from clusterfusion.architecture import DecoderConfig
from clusterfusion.arguments import as_int
from clusterfusion.engine.memory import require_memory
from clusterfusion.engine.modes import ModeChoice
from clusterfusion.engine.sampling import Sampler, SamplingOptions
from clusterfusion.engine.session import Session, check_token_ids
from clusterfusion.engine.text import StopFinder, TextDecoder, TextTokenizer
from clusterfusion.errors import ArgumentError, ContextLengthError
from clusterfusion.weights import DecoderWeights

DEFAULT_NEW_TOKENS = 128
FinishReason = Literal["eos", "stop", "length", "closed"]


@dataclasses.dataclass(frozen=True)
class Generation:
    """What came out of one call of `generate` or one finished stream. `str()` of it is its text.

    `token_ids` are the new tokens, an end-of-sequence token included. `text` is what they say, cut before a stop
    string; "" when the engine has no tokenizer. `finish_reason`: "eos", "stop" (a stop string), "length"
    (max_new_tokens or the end of the context), or "closed" (the caller closed the stream). Times are wall seconds.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: FinishReason
    time_to_first_token_s: float
    time_after_first_token_s: float

    def __str__(self) -> str:
        return self.text

    @property
    def ms_per_token(self) -> float | None:
        """Milliseconds a token after the first; None when there is only one."""
        steps = len(self.token_ids) - 1
        return self.time_after_first_token_s * 1e3 / steps if steps > 0 else None

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens a second after the first; None when there is only one."""
        per_token = self.ms_per_token
        return 1e3 / per_token if per_token else None


class Engine:
    """A decoder ready to generate. Make one with `clusterfusion.load`.

    Weights are shared by all sessions of an engine; a session holds its own K/V cache.
    """

    def __init__(
        self,
        weights: DecoderWeights,
        *,
        name: str,
        mode: ModeChoice,
        max_seq_len: int,
        tokenizer: TextTokenizer | None,
        eos_token_ids: Sequence[int],
        no_tokenizer_reason: str = "",
    ) -> None:
        self.weights = weights
        self.name = name
        self.max_seq_len = max_seq_len
        self.tokenizer = tokenizer
        self.eos_token_ids = tuple(eos_token_ids)
        self._no_tokenizer = f"{name} has no tokenizer" + f" ({no_tokenizer_reason})" * bool(no_tokenizer_reason)
        self._mode = mode
        self._idle: list[Session] = []  # sessions that streams gave back, with their caches

    def __repr__(self) -> str:
        return f"Engine({self.name!r}, mode={self.mode!r}, dtype={self.dtype}, device={str(self.device)!r})"

    @property
    def config(self) -> DecoderConfig:
        return self.weights.config

    @property
    def mode(self) -> str:
        """How a step runs: "reference", "split", "fused", "graph" or "model"."""
        return self._mode.name

    @property
    def mode_reason(self) -> str:
        """Why this mode was taken."""
        return self._mode.reason

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.dtype

    @property
    def device(self) -> torch.device:
        return self.weights.device

    def session(self) -> Session:
        """A new, empty session with room for `max_seq_len` tokens. Raises DeviceError where its cache does not fit."""
        cache_bytes = self.config.kv_elements_per_token * self.max_seq_len * self.dtype.itemsize
        require_memory(f"the K/V cache of {self.max_seq_len} tokens", cache_bytes, self.device)
        return Session(self.weights, self.max_seq_len, self.mode)

    def generate(
        self,
        prompt: str | Sequence[int] | Tensor,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> Generation:
        """Generate after `prompt`, text or token ids. Greedy unless `temperature` > 0; see SamplingOptions.

        Ends at an end-of-sequence token, before a stop string, or after `max_new_tokens` (None: 128, or what fits).
        Raises ArgumentError for unusable arguments and ContextLengthError when prompt and new tokens together do not
        fit `max_seq_len`; both before anything is computed.
        """
        stream = self._stream(
            prompt, max_new_tokens, SamplingOptions(temperature, top_k, top_p, repetition_penalty, seed), stop
        )
        for _ in stream:
            pass
        return stream.result

    def stream(
        self,
        prompt: str | Sequence[int] | Tensor,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> TextStream:
        """As `generate`, but yields the text in pieces as it comes; a piece never holds half a character.

        The iterator's `result` is the whole Generation once it has ended or was closed. Raises as `generate` does, at
        the call and not at the first piece.
        """
        if self.tokenizer is None:
            raise ArgumentError(f"{self._no_tokenizer}, so there is no text to stream; use generate(ids)")
        return self._stream(
            prompt, max_new_tokens, SamplingOptions(temperature, top_k, top_p, repetition_penalty, seed), stop
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens the model expects in front; of "" the beginning-of-sequence
        token. Raises ArgumentError for what is no text, and without a tokenizer."""
        if not isinstance(text, str):
            raise ArgumentError(f"prompt is {type(text).__name__}; it must be text (str)")
        if self.tokenizer is None:
            raise ArgumentError(f"{self._no_tokenizer}; pass token ids instead of text")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ArgumentError(f"prompt holds a lone surrogate at {error.start}; it must be valid Unicode") from error
        ids = self.tokenizer.encode(text)
        if not ids and self.config.bos_token_id is not None:
            ids = [self.config.bos_token_id]
        if not ids:
            raise ArgumentError("prompt is empty, and the model has no beginning-of-sequence token to start from")
        return ids

    def _stream(
        self,
        prompt: str | Sequence[int] | Tensor,
        max_new_tokens: int | None,
        options: SamplingOptions,
        stop: str | Sequence[str],
    ) -> TextStream:
        ids = self.encode(prompt) if isinstance(prompt, str) else prompt
        prompt_ids = check_token_ids(ids, self.config.vocab_size).tolist()
        stops = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, Sequence) else (None,)
        if not all(isinstance(s, str) and s for s in stops):
            raise ArgumentError(f"stop is {stop!r}; it must be a non-empty string or a list of them")
        if stops and self.tokenizer is None:
            raise ArgumentError(f"stop is {stop!r}, but {self._no_tokenizer} to find text with")
        return TextStream(self, prompt_ids, self._room(len(prompt_ids), max_new_tokens), options, stops)

    def _room(self, prompt_tokens: int, max_new_tokens: int | None) -> int:
        room = self.max_seq_len - prompt_tokens
        if max_new_tokens is not None:
            max_new_tokens = as_int("max_new_tokens", max_new_tokens, 1, 2**31)
        if room < (max_new_tokens or 1):
            limit = (
                f"load with a larger max_seq_len, up to {self.config.max_position}"
                if self.max_seq_len < self.config.max_position
                else "the model's limit"
            )
            asked = "one new token" if max_new_tokens is None else f"max_new_tokens {max_new_tokens}"
            raise ContextLengthError(
                f"a prompt of {prompt_tokens} tokens and {asked} do not fit the context of "
                f"{self.max_seq_len} ({limit}); at most {max(room, 0)} new tokens fit"
            )
        return min(DEFAULT_NEW_TOKENS, room) if max_new_tokens is None else max_new_tokens

    @contextlib.contextmanager
    def _borrow_session(self) -> Iterator[Session]:
        try:
            session = self._idle.pop()
        except IndexError:
            session = self.session()
        session.reset()
        try:
            yield session
        except GeneratorExit:  # the caller closed the stream; the session is sound
            self._idle.append(session)
            raise
        self._idle.append(session)  # not after an error: what the GPU left behind is unknown


class TextStream:
    """An iterator over pieces of generated text; `result` is the Generation so far, final once the iterator has ended."""

    def __init__(
        self,
        engine: Engine,
        prompt_ids: list[int],
        max_new_tokens: int,
        options: SamplingOptions,
        stops: tuple[str, ...],
    ) -> None:
        self._engine = engine
        self._prompt_ids = prompt_ids
        self._token_ids: list[int] = []
        self._text: list[str] = []
        self._finish_reason: FinishReason = "closed"
        self._first_token_s = self._last_token_s = 0.0
        self._pieces = self._run(max_new_tokens, Sampler(options, prompt_ids), StopFinder(stops))

    def __iter__(self) -> TextStream:
        return self

    def __next__(self) -> str:
        while True:  # an engine without a tokenizer has only empty pieces
            piece = next(self._pieces)
            if piece:
                self._text.append(piece)
                return piece

    def close(self) -> None:
        """Stop generating. `result` keeps what came so far."""
        self._pieces.close()

    @property
    def result(self) -> Generation:
        return Generation(
            text="".join(self._text),
            token_ids=tuple(self._token_ids),
            prompt_tokens=len(self._prompt_ids),
            finish_reason=self._finish_reason,
            time_to_first_token_s=self._first_token_s,
            time_after_first_token_s=self._last_token_s - self._first_token_s,
        )

    def _run(self, max_new_tokens: int, sampler: Sampler, stop: StopFinder) -> Generator[str, None, None]:
        tokenizer = self._engine.tokenizer
        decoder = TextDecoder(tokenizer, self._prompt_ids) if tokenizer else None
        with contextlib.closing(self._tokens(max_new_tokens, sampler)) as tokens:
            for token in tokens:
                if decoder is None:
                    continue
                yield stop.push(decoder.push(token))
                if stop.found is not None:
                    self._finish_reason = "stop"
                    return
        if decoder is not None:
            yield stop.push(decoder.finish())
            if stop.found is not None:
                self._finish_reason = "stop"
            yield stop.finish()

    def _tokens(self, max_new_tokens: int, sampler: Sampler) -> Generator[int, None, None]:
        start = time.perf_counter()
        with self._engine._borrow_session() as session:
            token = sampler.choose(session.prefill(self._prompt_ids), session.position)
            with contextlib.closing(session.decode(token, max_new_tokens - 1, sampler)) as following:
                while True:
                    self._last_token_s = time.perf_counter() - start
                    if not self._token_ids:
                        self._first_token_s = self._last_token_s
                    self._token_ids.append(token)
                    yield token
                    if token in self._engine.eos_token_ids:
                        self._finish_reason = "eos"
                        return
                    if len(self._token_ids) == max_new_tokens:
                        self._finish_reason = "length"
                        return
                    token = next(following)
