"""What `bench decode` times: a loop that takes in a prompt and chooses tokens greedily. Here are our own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from clusterfusion.engine import Engine
from clusterfusion.engine.modes import ModeChoice, why_not


@dataclasses.dataclass(frozen=True)
class Decoded:
    """One run of a loop. Times are wall time, to the first token and from one token to the next."""

    token_ids: tuple[int, ...]
    first_token_ms: float
    ms_per_token: float


class Loop(Protocol):
    """Ready to decode the same tokens after the same prompt as often as wanted."""

    def decode(self) -> Decoded:
        """Take in the prompt and choose all tokens. Returns when they are known."""
        ...


class EngineLoop:
    """`engine.generate`, as a user calls it, text of the tokens included where the model has a tokenizer.

    Holds an engine of its own on the weights of `engine`: its session stays from run to run, and goes with this loop.
    """

    def __init__(self, engine: Engine, mode: ModeChoice, room: int, ids: Sequence[int], new_tokens: int) -> None:
        self._engine = Engine(
            engine.weights,
            name=engine.name,
            mode=mode,
            max_seq_len=room,
            tokenizer=engine.tokenizer,
            eos_token_ids=(),  # every run makes all its tokens
        )
        self._ids, self._new_tokens = list(ids), new_tokens

    def decode(self) -> Decoded:
        made = self._engine.generate(self._ids, max_new_tokens=self._new_tokens)
        assert made.ms_per_token is not None  # at least two tokens
        return Decoded(made.token_ids, made.time_to_first_token_s * 1e3, made.ms_per_token)


def choose_modes(names: Sequence[str], engine: Engine) -> tuple[tuple[ModeChoice, ...], dict[str, str]]:
    """The modes of `names` that can run on `engine`'s weights, and why the others cannot. The reference mode, which
    always can, stands in if none does."""
    left_out: dict[str, str] = {}
    chosen = []
    for name in names:
        obstacle = why_not(name, engine.config, engine.dtype, engine.device)
        if obstacle is None:
            chosen.append(ModeChoice(name, "as asked"))
        else:
            left_out[name] = obstacle
    return tuple(chosen) or (ModeChoice("reference", "no other mode can run here"),), left_out
