"""`clusterfusion generate`: text as it comes, then one line of timing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clusterfusion.errors import ArgumentError

if TYPE_CHECKING:
    from clusterfusion.engine import Engine, Generation


def generate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A hub id (owner/name), a checkpoint folder, or 'demo'.")
    ],
    text: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The prompt. An empty one begins a text.", show_default=False)
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The prompt, as an option.")] = None,
    file: Annotated[str | None, typer.Option("--file", "-f", help="Read the prompt from a file; - for stdin.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", "-n", help="Most tokens to generate (default: 128, or what fits).")
    ] = None,
    temperature: Annotated[float, typer.Option("--temperature", "-t", help="0 is greedy.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Choose among the k likeliest tokens.")] = None,
    top_p: Annotated[float, typer.Option(help="Choose among the likeliest that reach this probability.")] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 discourages tokens seen so far.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling reproducible.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")] = None,
    mode: Annotated[str, typer.Option(help="auto, reference, split, fused, graph or model.")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="float16, bfloat16, float32 or float64.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")] = None,
    max_seq_len: Annotated[int | None, typer.Option(help="Tokens of context to make room for.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Generate text after a prompt, given as an argument, in a file, or on stdin."""
    prompt_text = read_prompt(text, prompt, file)
    from clusterfusion.engine import load

    engine = load(model, mode=mode, dtype=dtype, device=device, max_seq_len=max_seq_len)
    stream = engine.stream(
        prompt_text, max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed, tuple(stop or ())
    )
    if as_json:
        try:
            for _ in stream:
                pass
        finally:  # also after Ctrl-C: what came is not lost
            if stream.result.token_ids:
                typer.echo(json.dumps(describe(engine, prompt_text, stream.result)))
        return
    try:
        for piece in stream:
            _write(piece)
    finally:  # also after Ctrl-C: what came is on the screen, and so is what it took
        _write("\n")
        if stream.result.token_ids:
            typer.echo(timing_line(engine, stream.result), err=True)


def read_prompt(argument: str | None, option: str | None, file: str | None) -> str:
    """The prompt from the one place it was given. Raises ArgumentError for none, several, or an unreadable file."""
    given = [
        name for name, value in (("PROMPT", argument), ("--prompt", option), ("--file", file)) if value is not None
    ]
    if len(given) > 1:
        raise ArgumentError(f"the prompt was given {len(given)} times ({', '.join(given)}); give it once")
    if argument is not None or option is not None:
        return argument if argument is not None else option or ""
    if (file is None and (sys.stdin is None or sys.stdin.isatty())) or (file == "-" and sys.stdin is None):
        raise ArgumentError("there is no prompt: give it as an argument, with --file FILE, or on stdin")
    from clusterfusion.bench.texts import whole

    if file is None or file == "-":
        return _decode(whole(sys.stdin.buffer, "the prompt in stdin"), "stdin")
    try:
        with Path(file).open("rb") as stream:
            return _decode(whole(stream, f"the prompt in --file {file}"), f"--file {file}")
    except OSError as error:
        raise ArgumentError(f"--file {file} cannot be read: {error.strerror}") from error


def describe(engine: Engine, prompt: str, result: Generation) -> dict[str, Any]:
    """A generation as JSON: what was asked, what came, and what it took."""
    return {
        "model": engine.name,
        "mode": engine.mode,
        "mode_reason": engine.mode_reason,
        "dtype": str(engine.dtype).removeprefix("torch."),
        "device": str(engine.device),
        "prompt": prompt,
        "prompt_tokens": result.prompt_tokens,
        "text": result.text,
        "token_ids": list(result.token_ids),
        "new_tokens": len(result.token_ids),
        "finish_reason": result.finish_reason,
        "time_to_first_token_ms": result.time_to_first_token_s * 1e3,
        "ms_per_token": result.ms_per_token,
        "tokens_per_s": result.tokens_per_s,
    }


def timing_line(engine: Engine, result: Generation) -> str:
    """Time to first token, ms a token, tokens/s, and how they were had."""
    parts = [f"time to first token {result.time_to_first_token_s * 1e3:.1f} ms"]
    if result.ms_per_token is not None and result.tokens_per_s is not None:
        parts += [f"{result.ms_per_token:.3f} ms a token", f"{result.tokens_per_s:.1f} tokens/s"]
    how = f"{len(result.token_ids)} tokens, mode {engine.mode}, {str(engine.dtype).removeprefix('torch.')}, {engine.device}"
    return f"[{', '.join(parts)}; {how}]"


def _write(text: str) -> None:
    if sys.stdout is not None:  # None: a process without a stdout
        sys.stdout.write(text)
        sys.stdout.flush()


def _decode(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ArgumentError(f"the prompt in {source} is not UTF-8 (byte {error.start})") from error
