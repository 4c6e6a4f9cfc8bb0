"""`bench prefill`: wall time from a prompt's token ids to the first token, ours beside transformers' forward, in one run."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from clusterfusion.arguments import as_int
from clusterfusion.bench import environment
from clusterfusion.bench.causal_lm import CausalLM
from clusterfusion.bench.decode.options import FEWEST_RUNS, MOST_RUNS
from clusterfusion.bench.environment import Origin
from clusterfusion.bench.options import parse_contexts
from clusterfusion.bench.peers import cache_keyword
from clusterfusion.bench.samples import Candidate, Timing, one_line, round_robin, summarise
from clusterfusion.bench.texts import random_tokens
from clusterfusion.engine import Engine, Session
from clusterfusion.engine.memory import require_memory
from clusterfusion.engine.modes import choose_mode
from clusterfusion.engine.sampling import Sampler, SamplingOptions
from clusterfusion.errors import ClusterFusionError

if TYPE_CHECKING:
    from rich.table import Table

FORMAT = 1  # of the JSON; grows when a field changes its meaning or goes away
DEFAULT_PROMPTS = (16, 128, 512, 1024, 2048)
CPU_PROMPTS = (16,)  # enough to see that it runs
DEFAULT_RUNS = 20
# Of each loop at each length, before it is timed: libraries are set up, memory is allocated, clocks have risen.
WARM_RUNS, WARM_S = 2, 0.5
PEER = "transformers"
SCOPE = (
    "wall time from a prompt's token ids on the host to the first token on the host, greedy, batch 1, an empty cache; "
    "transformers: one forward with SDPA attention, a dynamic cache and logits of the last token alone, then argmax, on the same "
    "weights"
)
_COLUMNS = ("prompt", "loop", "ms", "p10", "p90", "tokens/s", f"x {PEER}", "first token")


@dataclasses.dataclass(frozen=True)
class PrefillOptions:
    """Checked by `prefill_options`. `prompts` are lengths in tokens."""

    prompts: tuple[int, ...]
    runs: int
    peers: bool


def prefill_options(
    max_position: int | None, *, on_gpu: bool, prompts: str | None = None, runs: int = DEFAULT_RUNS, peers: bool = True
) -> PrefillOptions:
    """The options, checked against a model of `max_position` positions; None for one that is not known yet. Raises
    ArgumentError naming the option, its value and what is needed."""
    most = max_position or 1 << 31
    if prompts is None:
        fitting = tuple(length for length in (DEFAULT_PROMPTS if on_gpu else CPU_PROMPTS) if length <= most)
        chosen = fitting or (most,)
    else:
        chosen = parse_contexts(prompts, most, least=1, name="prompts")
    return PrefillOptions(chosen, as_int("runs", runs, FEWEST_RUNS, MOST_RUNS), peers)


@dataclasses.dataclass(frozen=True)
class PromptTimes:
    """At one length: every loop's times and the first token that it chose, ours first."""

    prompt: int
    timings: Mapping[str, Timing]
    first_tokens: Mapping[str, int]

    def median_ms(self, loop: str) -> float | None:
        """None for a loop that failed or is not there."""
        times = self.timings[loop].times_ms if loop in self.timings else ()
        return summarise(times).median_ms if times else None

    def ratio(self, loop: str) -> float | None:
        """Of a loop's time to transformers'."""
        ours, theirs = self.median_ms(loop), self.median_ms(PEER)
        return ours / theirs if ours and theirs else None


@dataclasses.dataclass(frozen=True)
class PrefillReport:
    """One run on `name`'s weights."""

    options: PrefillOptions
    origin: Origin
    name: str
    dtype: str
    prompts: tuple[PromptTimes, ...]
    interrupted: bool = False


FirstToken = Callable[[Sequence[int]], int]


class _Peer:
    """transformers' model, which shares all its parameters with ours."""

    def __init__(self, engine: Engine) -> None:
        self._model = CausalLM.shared(engine.weights).model
        self._keyword = cache_keyword(self._model)

    @torch.no_grad()
    def first_token(self, ids: Sequence[int]) -> int:
        from transformers import DynamicCache

        cache = {self._keyword: DynamicCache(config=self._model.config)}
        prompt = torch.tensor([list(ids)], device=self._model.device)
        return int(self._model(input_ids=prompt, use_cache=True, logits_to_keep=1, **cache).logits[0, -1].argmax())


def _own_loop(engine: Engine, mode: str, room: int) -> FirstToken:
    session = Session(engine.weights, room, mode)

    def first_token(ids: Sequence[int]) -> int:
        session.reset()
        return Sampler(SamplingOptions(), ids).choose(session.prefill(ids), session.position)

    return first_token


def _loops(engine: Engine, options: PrefillOptions, progress: Callable[[str], None]) -> dict[str, FirstToken]:
    room = max(options.prompts)
    modes = dict.fromkeys((choose_mode("auto", engine.config, engine.dtype, engine.device).name, "reference"))
    caches = (len(modes) + options.peers) * room * engine.config.kv_elements_per_token * engine.dtype.itemsize
    require_memory(f"bench prefill of {engine.name}", caches, engine.device)
    loops = {mode: _own_loop(engine, mode, room) for mode in modes}
    if options.peers:
        try:
            loops[PEER] = _Peer(engine).first_token
        except ClusterFusionError as error:
            progress(f"{PEER} left out: {one_line(error)}")
    return loops


@torch.no_grad()
def measure_prefill(
    engine: Engine,
    options: PrefillOptions,
    progress: Callable[[str], None],
    command: str = "",
    on_prompt: Callable[[PrefillReport], None] = lambda report: None,
) -> PrefillReport:
    """Everything in one run on `engine`'s weights and device, whose own mode does not matter. At each length all loops are
    visited in turn, run by run. `on_prompt` gets the report so far after every length; Ctrl-C ends the run with what is done.

    Raises DeviceError without the memory, or when one of our loops fails; a peer that fails is in the report.
    """
    loops = _loops(engine, options, progress)
    origin = environment.origin(command, engine.device)
    report = PrefillReport(options, origin, engine.name, str(engine.dtype).removeprefix("torch."), ())
    try:
        for prompt in options.prompts:
            times = _measure_prompt(engine, loops, prompt, options.runs)
            report = dataclasses.replace(report, prompts=(*report.prompts, times))
            said = [f"{name} {times.median_ms(name) or float('nan'):.3f}" for name in loops]
            progress(f"prompt of {prompt}: ms to the first token: {', '.join(said)}")
            on_prompt(report)
    except KeyboardInterrupt:
        if not report.prompts:
            raise
        return dataclasses.replace(report, interrupted=True)
    return report


def _measure_prompt(engine: Engine, loops: Mapping[str, FirstToken], prompt: int, runs: int) -> PromptTimes:
    ids = random_tokens(engine.config.vocab_size, prompt, seed=prompt)
    first: dict[str, int] = {}
    warm_s = WARM_S if engine.device.type == "cuda" else 0.0

    def sample(candidate: Candidate, count: int) -> list[float]:
        taken: list[float] = []
        loop, begun_s = loops[candidate.name], time.perf_counter()
        warm, untimed = candidate.name in first, 0
        while len(taken) < count:
            began_s = time.perf_counter()
            first[candidate.name] = loop(ids)  # known on the host, so all that was launched for it has run
            ended_s = time.perf_counter()
            if warm:
                taken.append((ended_s - began_s) * 1e3)
            untimed += not warm
            warm = warm or (untimed >= WARM_RUNS and ended_s - begun_s >= warm_s)
        return taken

    candidates = [Candidate(name, _nothing, _nothing, runs, may_fail=name == PEER) for name in loops]
    return PromptTimes(prompt, round_robin(candidates, sample, rounds=runs), first)


def _nothing() -> None:
    pass


def to_json(report: PrefillReport) -> dict[str, Any]:
    """The report as JSON values. Times in ms."""
    return {
        "benchmark": "prefill",
        "format": FORMAT,
        "scope": SCOPE,
        **dataclasses.asdict(report.origin),
        "model": {"name": report.name, "dtype": report.dtype},
        "runs": report.options.runs,
        "asked_prompts": list(report.options.prompts),
        "interrupted": report.interrupted,
        "prompts": [
            {
                "prompt": times.prompt,
                "loops": {
                    name: (dataclasses.asdict(summarise(timing.times_ms)) if timing.times_ms else {})
                    | {
                        "error": timing.error,
                        "first_token": times.first_tokens.get(name),
                        "ratio_to_transformers": times.ratio(name),
                        "times_ms": list(timing.times_ms),
                    }
                    for name, timing in times.timings.items()
                },
            }
            for times in report.prompts
        ],
    }


def heading(report: PrefillReport) -> str:
    return f"{report.name}, {report.dtype}, batch 1, {report.options.runs} runs, on {report.origin.device['name']}"


def rows(report: PrefillReport) -> Iterator[tuple[str, ...]]:
    """Cells in the order of the columns."""
    for times in report.prompts:
        prompt = str(times.prompt)
        for name, timing in times.timings.items():
            if timing.times_ms:
                summary, ratio = summarise(timing.times_ms), times.ratio(name)
                cells = [f"{ms:.3f}" for ms in (summary.median_ms, summary.p10_ms, summary.p90_ms)]
                cells += [f"{times.prompt / summary.median_ms * 1e3:.0f}", "" if ratio is None else f"{ratio:.3f}"]
                yield (prompt, name, *cells, str(times.first_tokens[name]))
            else:
                yield (prompt, name, "failed", "", "", "", "", "")
            prompt = ""


def table(report: PrefillReport) -> Table:
    from rich.table import Table

    made = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1))
    for column in _COLUMNS:
        made.add_column(column, justify="left" if column == "loop" else "right", no_wrap=True)
    for cells in rows(report):
        made.add_row(*cells)
    return made


def lines(report: PrefillReport) -> list[str]:
    """What the table does not say: failures, and an early end."""
    said = [
        f"{name} failed at a prompt of {times.prompt}: {timing.error}"
        for times in report.prompts
        for name, timing in times.timings.items()
        if timing.error is not None
    ]
    if report.interrupted:
        said.append(f"interrupted after {len(report.prompts)} of {len(report.options.prompts)} prompts")
    return said


def markdown(report: PrefillReport) -> str:
    """Heading, table and lines as Markdown."""
    align = tuple("---" if column == "loop" else "---:" for column in _COLUMNS)
    made = [heading(report), "", *(f"| {' | '.join(cells)} |" for cells in (_COLUMNS, align, *rows(report))), ""]
    made += [f"- {line}" for line in lines(report)]
    return "\n".join([*made, f"{SCOPE}. Medians over runs.", "", f"`{report.origin.command}`"]) + "\n"
