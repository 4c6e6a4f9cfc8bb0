"""What `bench full` is asked beyond `bench decode`: a text to score, or the reason why none is."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from clusterfusion.bench.texts import DEFAULT_DATASET, encode, has_datasets, no_tokenizer, read_text
from clusterfusion.engine import Engine
from clusterfusion.engine.loading import DEMO
from clusterfusion.errors import ArgumentError

TEXT_TOKENS, CPU_TEXT_TOKENS = 4096, 256  # of the text; a step takes milliseconds on both


@dataclasses.dataclass(frozen=True)
class TextOptions:
    """Checked by `text_options`. `text_file` None: the model's default text. `left_out`: why nothing is scored."""

    text_file: Path | None
    left_out: str | None = None


def text_options(random_weights: str | None, text_file: Path | None = None, wanted: bool = True) -> TextOptions:
    """What can be said before a model is loaded. Raises ArgumentError for a text that cannot be read, or that nothing
    would read."""
    if text_file is not None and (random_weights is not None or not wanted):
        why = "random weights know no text" if wanted else "no perplexity is wanted"
        raise ArgumentError(f"--text is {str(text_file)!r}, and {why}; leave it out")
    if not wanted:
        return TextOptions(None, "not asked for")
    if random_weights is not None:
        return TextOptions(None, "random weights know no text")
    if text_file is not None:
        read_text(text_file)
    return TextOptions(text_file)


def text_options_for(engine: Engine, options: TextOptions) -> TextOptions:
    """The options beside a model. Raises ArgumentError for a text that the caller named and the model cannot read."""
    if options.left_out is not None:
        return options
    if options.text_file is not None:
        encode(engine, "a")
        return options
    if engine.tokenizer is None:
        return TextOptions(None, no_tokenizer(engine))
    if engine.name != DEMO and not has_datasets():
        return TextOptions(
            None,
            f"no --text FILE was named, and the package datasets, which would give {DEFAULT_DATASET}, is not installed",
        )
    return options
