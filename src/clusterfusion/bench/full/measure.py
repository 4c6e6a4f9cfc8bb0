"""The run of `bench full`: whole generate loops at every context, then a text through decoding and prefill."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from clusterfusion.bench.causal_lm import CausalLM
from clusterfusion.bench.decode.measure import OnShare, Progress, measure_decode
from clusterfusion.bench.decode.options import DecodeOptions
from clusterfusion.bench.decode.report import DecodeReport
from clusterfusion.bench.evaluation import Sides
from clusterfusion.bench.full.options import CPU_TEXT_TOKENS, TEXT_TOKENS, TextOptions
from clusterfusion.bench.full.report import FullReport
from clusterfusion.bench.perplexity import perplexity
from clusterfusion.bench.samples import one_line
from clusterfusion.engine import Engine, ModeChoice
from clusterfusion.errors import ClusterFusionError


def measure_full(
    engine: Engine,
    options: DecodeOptions,
    text: TextOptions,
    progress: Progress,
    command: str = "",
    on_part: Callable[[FullReport], None] = lambda report: None,
    on_share: OnShare = lambda share: None,
) -> FullReport:
    """Everything in one run, on `engine`'s weights. `on_part` gets the report so far after every context and after the
    text. Ctrl-C ends the run with what is done; before the first context is done it is raised.

    Raises as `measure_decode` does. A text that cannot be scored after all is in the report and ends nothing.
    """
    parts = len(options.contexts) + (text.left_out is None)

    def report_of(decode: DecodeReport, left_out: str) -> FullReport:
        return FullReport(decode, perplexity=None, no_perplexity=text.left_out or left_out)

    decode = measure_decode(
        engine,
        options,
        progress,
        command,
        lambda so_far: on_part(report_of(so_far, "not measured yet")),
        lambda share: on_share(share * len(options.contexts) / parts),
    )
    if decode.interrupted or text.left_out is not None:
        return report_of(decode, "interrupted")
    report = _with_perplexity(engine, report_of(decode, ""), text, progress, command)
    on_share(1.0)
    on_part(report)
    return report


def _with_perplexity(
    engine: Engine, report: FullReport, text: TextOptions, progress: Progress, command: str
) -> FullReport:
    """In the first mode that was measured, beside transformers on the same tensors."""
    mode = next(iter(report.decode.contexts[0].modes))
    ours = Engine(
        engine.weights,
        name=engine.name,
        mode=ModeChoice(mode, "the first one measured"),
        max_seq_len=engine.max_seq_len,
        tokenizer=engine.tokenizer,
        eos_token_ids=engine.eos_token_ids,
    )
    try:
        scored = perplexity(
            Sides(ours, CausalLM.shared(engine.weights)),
            progress,
            text_file=text.text_file,
            max_tokens=TEXT_TOKENS if engine.device.type == "cuda" else CPU_TEXT_TOKENS,
            command=command,
        )
    except (ClusterFusionError, torch.OutOfMemoryError) as error:
        return dataclasses.replace(report, no_perplexity=one_line(error))
    except KeyboardInterrupt:
        stopped = dataclasses.replace(report.decode, interrupted=True)
        return dataclasses.replace(report, decode=stopped, no_perplexity="interrupted")
    return dataclasses.replace(report, perplexity=scored, no_perplexity=None)
