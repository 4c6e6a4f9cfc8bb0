"""What `bench decode` is asked to measure, checked before anything is made."""

from __future__ import annotations

import dataclasses

import torch

from clusterfusion.arguments import as_int
from clusterfusion.bench.options import ANY_POSITION, parse_contexts, require_one_source, some_contexts
from clusterfusion.engine import MODES, Engine, load
from clusterfusion.errors import ArgumentError, DeviceError
from clusterfusion.named_shapes import named_shape

DEFAULT_MODES = "model,graph,fused,split"
DEFAULT_CONTEXTS = (16, 128, 512, 1024, 1920)  # shortened to what the model has room for
DEFAULT_NEW_TOKENS = 128
CPU_CONTEXTS, CPU_NEW_TOKENS = (16,), 8  # enough to see that it runs
CPU_MOST_PARAMETERS = 200_000_000
FEWEST_RUNS, MOST_RUNS = 5, 1000


@dataclasses.dataclass(frozen=True)
class DecodeOptions:
    """Checked by `decode_options`. `contexts` are prompts' lengths in tokens, each at least 1; at `peer_contexts` peers
    are measured too."""

    contexts: tuple[int, ...]
    new_tokens: int
    runs: int
    modes: tuple[str, ...]
    modes_named: bool  # by the caller, who then wants one of them and no other
    peer_contexts: tuple[int, ...]

    @property
    def room(self) -> int:
        """Tokens that a session has to have room for."""
        return max(self.contexts) + self.new_tokens


def decode_options(
    max_position: int | None,
    *,
    on_gpu: bool,
    contexts: str | None = None,
    new_tokens: int | None = None,
    runs: int = FEWEST_RUNS,
    modes: str | None = None,
    peers: bool = True,
    peer_contexts: str | None = None,
) -> DecodeOptions:
    """The options, checked against a model of `max_position` positions; None for one that is not known yet. What is left
    out becomes what fits it and the machine.

    Raises ArgumentError naming the option, its value and what is needed.
    """
    limit = max_position or ANY_POSITION
    if new_tokens is None:
        new_tokens = min(DEFAULT_NEW_TOKENS if on_gpu else CPU_NEW_TOKENS, limit // 2)
    new_tokens = as_int("new_tokens", new_tokens, 2, limit - 1)
    most = limit - new_tokens
    if contexts is None:
        chosen = tuple(dict.fromkeys(min(context, most) for context in (DEFAULT_CONTEXTS if on_gpu else CPU_CONTEXTS)))
    else:
        chosen = parse_contexts(contexts, ANY_POSITION, least=1)
    if max(chosen) > most:
        raise ArgumentError(
            f"contexts is {max(chosen)}, which makes {max(chosen) + new_tokens} tokens with the {new_tokens} new ones; the "
            f"model has {limit} positions, so it must be from 1 to {most}"
        )
    with_peers = some_contexts(peer_contexts, chosen, peers)
    return DecodeOptions(
        contexts=chosen,
        new_tokens=new_tokens,
        runs=as_int("runs", runs, FEWEST_RUNS, MOST_RUNS),
        modes=mode_names(DEFAULT_MODES if modes is None else modes),
        modes_named=modes is not None,
        peer_contexts=with_peers,
    )


def mode_names(modes: str) -> tuple[str, ...]:
    """The names in text such as "model,graph", each once. Raises ArgumentError for one that does not exist."""
    names = tuple(dict.fromkeys(name.strip() for name in modes.split(",")))
    for name in names:
        if name not in MODES:
            raise ArgumentError(
                f"modes is {modes[:80]!r}; it must be names from {', '.join(map(repr, MODES))}, with commas between"
            )
    return names


def check_source(model: str | None, random_weights: str | None, on_gpu: bool, what: str = "bench decode") -> int | None:
    """For the command `what`, what can be said before weights are there: a shape's positions, None for a checkpoint.

    Raises ArgumentError unless one of the two is given; DeviceError for a shape that is too large for a CPU.
    """
    require_one_source(what, model, random_weights)
    if random_weights is None:
        return None
    config = named_shape(random_weights)
    if not on_gpu and config.num_parameters > CPU_MOST_PARAMETERS:
        raise DeviceError(
            f"{what} of {random_weights} needs an NVIDIA GPU, and PyTorch sees none here; on a CPU it measures the "
            f"reference mode alone: take the model demo, or a shape of at most {CPU_MOST_PARAMETERS // 10**6} million "
            "parameters"
        )
    return config.max_position


def load_model(model: str | None, random_weights: str | None, dtype: str | None) -> Engine:
    """The model whose weights all loops share, on the current GPU where there is one. Raises as `load` does."""
    return load(model, random_weights=random_weights, mode="reference", dtype=dtype)


def has_gpu() -> bool:
    return torch.cuda.is_available()
