"""`clusterfusion models`: the named shapes with their sizes."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

BYTES_PER_ELEMENT = 2  # float16 and bfloat16


def models(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the named shapes, for load(random_weights=NAME), with their sizes at 16 bits."""
    from clusterfusion.named_shapes import NAMED_SHAPES, named_shape

    configs = {name: named_shape(name) for name in NAMED_SHAPES}
    if as_json:
        rows = [
            dataclasses.asdict(config)
            | {
                "name": name,
                "num_parameters": config.num_parameters,
                "step_bytes": config.step_parameters * BYTES_PER_ELEMENT,
                "kv_bytes_per_token": config.kv_elements_per_token * BYTES_PER_ELEMENT,
            }
            for name, config in configs.items()
        ]
        typer.echo(json.dumps(rows))
        return

    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1))
    table.add_column("shape", no_wrap=True)
    for heading in ("layers", "hidden", "heads", "MLP", "vocab", "context", "params", "GB/token", "KV KB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, c in configs.items():
        table.add_row(
            name,
            str(c.num_layers),
            str(c.hidden_size),
            (f"{c.num_heads}/{c.num_kv_heads}" if c.num_kv_heads != c.num_heads else str(c.num_heads))
            + f"x{c.head_dim}",
            str(c.intermediate_size),
            str(c.vocab_size),
            str(c.max_position),
            f"{c.num_parameters / 1e9:.3g}B" if c.num_parameters >= 1e9 else f"{c.num_parameters / 1e6:.0f}M",
            f"{c.step_parameters * BYTES_PER_ELEMENT / 1e9:.3f}",
            f"{c.kv_elements_per_token * BYTES_PER_ELEMENT / 1024:.0f}",
        )
    console = Console(width=max(Console().width, 120))  # the table whole, whatever the terminal
    console.print(table)
    console.print(
        "heads: query/key-value x dimension; GB/token: weights a decode step reads; KV KB: cache a token adds (16 bits)",
        style="dim",
    )
