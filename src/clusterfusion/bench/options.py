"""What `bench layer` is asked to measure, checked before anything is made, and what other commands check likewise."""

from __future__ import annotations

import dataclasses

from clusterfusion.architecture import DecoderConfig
from clusterfusion.arguments import as_int
from clusterfusion.errors import ArgumentError, UnsupportedModelError
from clusterfusion.named_shapes import named_shape
from clusterfusion.plan.block import why_not

DTYPES = ("float16", "bfloat16")
FEWEST_REPEATS = 100  # a median of fewer is no evidence
MOST_REPEATS = 100_000
DEFAULT_CONTEXTS = (16, 512, 1024, 2047)
ANY_POSITION = 1 << 31  # more than any model has: where its limit is not known yet


@dataclasses.dataclass(frozen=True)
class LayerOptions:
    """Checked by `layer_options`. `contexts` are counts of cached tokens; the step's own token stands after them."""

    shape: str
    config: DecoderConfig  # with `layers` layers
    contexts: tuple[int, ...]
    dtype: str
    repeats: int
    peer_contexts: tuple[int, ...]  # those that transformers is measured at

    @property
    def layers(self) -> int:
        return self.config.num_layers


def layer_options(
    shape: str,
    *,
    contexts: str | tuple[int, ...] = DEFAULT_CONTEXTS,
    layers: int | None = None,
    dtype: str = "float16",
    repeats: int = FEWEST_REPEATS,
    peers: bool = True,
    peer_contexts: str | None = None,
) -> LayerOptions:
    """The options, checked. `contexts` may be text such as "16,512"; with `peers`, transformers is measured at
    `peer_contexts`, all of them if None.

    Raises ArgumentError naming the option, its value and what is needed; UnsupportedModelError for a shape that the
    kernels do not run.
    """
    config = named_shape(shape)
    obstacle = why_not(config)
    if obstacle:
        raise UnsupportedModelError(f"{shape} cannot be measured: {obstacle}")
    if peers and config.family != "gpt_neox":
        raise UnsupportedModelError(
            f"{shape} cannot be measured beside transformers' layers, of which only GPT-NeoX's are set up: leave them out "
            "(--no-peers), or measure whole steps (bench decode)"
        )
    if dtype not in DTYPES:
        raise ArgumentError(f"dtype is {dtype!r}; it must be one of {', '.join(map(repr, DTYPES))}")
    if layers is not None:
        layers = as_int("layers", layers, 1, config.num_layers)
        config = dataclasses.replace(config, num_layers=layers)
    chosen = parse_contexts(contexts, config.max_position - 1)
    return LayerOptions(
        shape=shape,
        config=config,
        contexts=chosen,
        dtype=dtype,
        repeats=as_int("repeats", repeats, FEWEST_REPEATS, MOST_REPEATS),
        peer_contexts=some_contexts(peer_contexts, chosen, peers),
    )


def some_contexts(peer_contexts: str | None, contexts: tuple[int, ...], peers: bool) -> tuple[int, ...]:
    """Those of `contexts` that text such as "16,512" names; all of them if None; none without `peers`. Raises ArgumentError for
    another, and where there is text without `peers`."""
    if peer_contexts is None:
        return contexts if peers else ()
    if not peers:
        raise ArgumentError(
            f"peer_contexts is {peer_contexts[:80]!r}, but transformers is left out (--no-peers); leave out one of the two"
        )
    chosen = parse_contexts(peer_contexts, ANY_POSITION, name="peer_contexts")
    others = [context for context in chosen if context not in contexts]
    if others:
        raise ArgumentError(
            f"peer_contexts is {peer_contexts[:80]!r}, where {others[0]} is not a context that is measured; it must be "
            f"some of {', '.join(map(str, contexts))}"
        )
    return chosen


def parse_contexts(
    contexts: str | tuple[int, ...], most: int, least: int = 0, name: str = "contexts"
) -> tuple[int, ...]:
    """Counts of cached tokens, from text such as "16,512" or as they are. Raises ArgumentError that names the option
    `name` unless each is from `least` to `most`, there is at least one, and none comes twice."""
    if isinstance(contexts, str):
        parts = contexts.split(",")
        if not all(part.strip().isascii() and part.strip().isdigit() and len(part) < 20 for part in parts):
            raise ArgumentError(
                f"{name} is {contexts[:80]!r}; it must be numbers of tokens with commas between, as 16,512"
            )
        contexts = tuple(map(int, parts))
    checked = tuple(as_int(name, context, least, most) for context in contexts)
    if not checked or len(set(checked)) < len(checked):
        raise ArgumentError(f"{name} is {contexts!r}; it must hold at least one number of tokens, and none twice")
    return checked


def require_one_source(what: str, model: str | None, random_weights: str | None) -> None:
    """For a command, or whatever `what` is: raise ArgumentError unless one of the two is given."""
    if (model is None) == (random_weights is None):
        got = "neither was" if model is None else "both were"
        raise ArgumentError(f"{what} needs either MODEL or --random-weights SHAPE; {got} given")
