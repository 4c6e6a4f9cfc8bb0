"""The eight scripts that the seed ships, and the commands here that take their place.

tests/test_seed_commands.py runs every `on_cpu` command; `benchmark_docs.py` draws the table and says what is on record.
"""

from __future__ import annotations

import dataclasses

TINY_LLAMA = "./tiny-llama"  # a checkpoint folder that the test makes


@dataclasses.dataclass(frozen=True)
class SeedCommand:
    """`script` lies in the seed's tests/. `kind` and `model` are those of the result files that record `command`, with
    whatever weights; `fails` says what gives a non-zero exit status, where the seed prints."""

    script: str
    command: str
    on_cpu: str
    kind: str
    model: str
    fails: str


_TOKENS_DIFFER = "tokens of two modes or runs differ"
_NOT_LOSSLESS = (
    "a token differs from transformers' and is neither a tie within rounding nor right by float64, or a bit differs between "
    "runs or modes"
)
_ALL_MODES = "--modes split,fused,graph,model"

SEED_COMMANDS = (
    SeedCommand(
        script="benchmark_full.py",
        command="clusterfusion bench full EleutherAI/pythia-2.8b",
        on_cpu="clusterfusion bench full demo --contexts 8 --new-tokens 3",
        kind="full",
        model="pythia-2.8b",
        fails=f"{_TOKENS_DIFFER}, or our perplexity is not finite",
    ),
    SeedCommand(
        script="benchmark_decode.py",
        command="clusterfusion bench decode --random-weights pythia-2.8b",
        on_cpu="clusterfusion bench decode --random-weights pythia-14m --contexts 8 --new-tokens 3",
        kind="decode",
        model="pythia-2.8b",
        fails=_TOKENS_DIFFER,
    ),
    SeedCommand(
        script="benchmark_decode_6b9.py",
        command="clusterfusion bench decode --random-weights pythia-6.9b",
        on_cpu="clusterfusion bench decode demo --contexts 8 --new-tokens 3",
        kind="decode",
        model="pythia-6.9b",
        fails=_TOKENS_DIFFER,
    ),
    SeedCommand(
        script="verify_lossless.py",
        command=f"clusterfusion verify EleutherAI/pythia-2.8b {_ALL_MODES}",
        on_cpu="clusterfusion verify demo --prompts 2 --tokens 3",
        kind="verify",
        model="pythia-2.8b",
        fails=_NOT_LOSSLESS,
    ),
    SeedCommand(
        script="evaluate_decode_quality.py",
        command="clusterfusion quality EleutherAI/pythia-2.8b",
        on_cpu="clusterfusion quality demo --tokens 8",
        kind="quality",
        model="pythia-2.8b",
        fails="our numbers are not finite; it sets our errors against float64 beside transformers', with intervals",
    ),
    SeedCommand(
        script="test_pythia.py",
        command=f"clusterfusion verify --random-weights pythia-2.8b {_ALL_MODES}",
        on_cpu="clusterfusion verify --random-weights pythia-14m --prompts 2 --tokens 3",
        kind="verify",
        model="pythia-2.8b",
        fails=_NOT_LOSSLESS,
    ),
    SeedCommand(
        script="test_pythia_6b9.py",
        command=f"clusterfusion verify --random-weights pythia-6.9b {_ALL_MODES}",
        on_cpu="clusterfusion verify --random-weights pythia-31m --prompts 2 --tokens 3",
        kind="verify",
        model="pythia-6.9b",
        fails=_NOT_LOSSLESS,
    ),
    SeedCommand(
        script="test_llama.py",
        command="clusterfusion verify --random-weights llama-3.2-1b",
        on_cpu=f"clusterfusion verify {TINY_LLAMA} --prompts 2 --tokens 3",
        kind="verify",
        model="llama-3.2-1b",
        fails=_NOT_LOSSLESS,
    ),
)
