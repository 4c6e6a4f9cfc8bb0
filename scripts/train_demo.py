"""Trains the built-in `demo` model: a byte-level GPT-NeoX small enough to ship inside the package.

The steps, in order: get the text (demo_corpus.py), split it, train every candidate architecture with every dropout
rate, keep the one with the best validation loss, round it to fp16, measure it, sample from it, and write the model
folder with its card. The folder is written as soon as a run is the best so far, so stopping early (Ctrl-C, --minutes)
loses nothing that was finished.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import hashlib
import json
import math
import os
import platform
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import demo_corpus

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before torch loads: cuBLAS is deterministic only so

ROOT = Path(__file__).resolve().parent.parent
MODEL_FOLDER = ROOT / "src" / "clusterfusion" / "demo_model"

CONTEXT = 2048
EVAL_STRIDE = 1024  # each scored byte sees at least this many bytes before it, once the text is that long
END_OF_TEXT = demo_corpus.DOCUMENT_END
EVAL_BATCH = 16  # windows evaluated together
VOCABULARY = 257  # token 0 ends a document; byte b is token b + 1
VALIDATION_SHARE, TEST_SHARE = 0.02, 0.02
FIRST_WINS_WITHIN = 0.01  # a later candidate replaces the first only if it is better by more than this
EXCERPT_BOOK, EXCERPT_BYTES = "pride_and_prejudice", 3000
COMMON_WORDS = 300
PROMPT = "The morning was fine, and Elizabeth"
GREEDY_TOKENS, SAMPLED_TOKENS, TEMPERATURE = 300, 700, 0.8


@dataclass(frozen=True)
class Architecture:
    """The shape of one candidate: parallel residual, biases, exact GELU, rotary on a quarter of every head."""

    hidden_size: int
    layers: int
    heads: int

    @property
    def name(self) -> str:
        return f"{self.hidden_size}x{self.layers}x{self.heads}"

    def __str__(self) -> str:
        return self.name

    @classmethod
    def parse(cls, text: str) -> Architecture:
        match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
        if not match:
            raise argparse.ArgumentTypeError(f"{text!r} is not HIDDENxLAYERSxHEADS, for example 256x4x4")
        hidden, layers, heads = map(int, match.groups())
        if hidden % heads or hidden // heads % 8:
            raise argparse.ArgumentTypeError(f"{text!r}: a quarter of the head size {hidden}/{heads} is not even")
        return cls(hidden, layers, heads)


@dataclass(frozen=True)
class Settings:
    """What every run of one training shares."""

    steps: int
    batch_size: int
    sequence_length: int
    learning_rate: float
    final_learning_rate_share: float
    warmup_steps: int
    weight_decay: float
    adam_betas: tuple[float, float]
    gradient_clip: float
    eval_every: int
    seed: int
    compiled: bool
    minutes: float | None


@dataclass(frozen=True)
class Split:
    """The text cut by position: each book's last 2 % is test, the 2 % before it validation, the rest training."""

    train: dict[str, bytes]
    validation: dict[str, bytes]
    test: dict[str, bytes]

    @property
    def excerpt(self) -> str:
        """The opening of one book's test part, whole characters only; it is shipped in the log."""
        book = EXCERPT_BOOK if EXCERPT_BOOK in self.test else next(iter(self.test))
        return self.test[book][:EXCERPT_BYTES].decode("utf-8", errors="ignore")


def split_books(books: list[demo_corpus.Book]) -> Split:
    """Cut every book at the two paragraph ends nearest to its share, so that no paragraph is in two parts."""
    split = Split({}, {}, {})
    for book in books:
        text = f"\n{END_OF_TEXT}\n".join(book.chapters) + f"\n{END_OF_TEXT}\n"
        first = text.index("\n\n", int(len(text) * (1 - VALIDATION_SHARE - TEST_SHARE))) + 2
        second = text.index("\n\n", int(len(text) * (1 - TEST_SHARE))) + 2
        parts = (text[:first], text[first:second], text[second:])
        for target, part in zip((split.train, split.validation, split.test), parts, strict=True):
            target[book.name] = part.encode("utf-8")
    return split


def to_tokens(text: bytes) -> list[int]:
    """One document part as token ids, led by END_OF_TEXT; a separator line becomes the single token 0."""
    ids = [0]
    for position, chapter in enumerate(text.split(f"\n{END_OF_TEXT}\n".encode())):
        if position:
            ids.append(0)
        ids.extend(byte + 1 for byte in chapter)
    return ids


def words(text: str) -> list[str]:
    """The lower-case words of a text: runs of letters and inner apostrophes."""
    return re.findall(r"[a-z]+(?:'[a-z]+)*", text.lower())


def build_tokenizer() -> Any:
    """A byte-level `tokenizers.Tokenizer` with no merges: token 0 is END_OF_TEXT, byte b is token b + 1."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {END_OF_TEXT: 0} | {character: byte + 1 for byte, character in enumerate(byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return tokenizer


def byte_characters() -> list[str]:
    """The printable character that byte-level tokenizers write for each of the 256 bytes (GPT-2's bytes_to_unicode)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def build_model(architecture: Architecture, dropout: float) -> Any:
    """A freshly initialised fp32 GPTNeoXForCausalLM; torch's global seed decides its weights."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=architecture.hidden_size,
        num_hidden_layers=architecture.layers,
        num_attention_heads=architecture.heads,
        intermediate_size=4 * architecture.hidden_size,
        hidden_act="gelu",
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        use_parallel_residual=True,
        attention_bias=True,
        tie_word_embeddings=False,
        hidden_dropout=dropout,
        attention_dropout=dropout,
        bos_token_id=0,
        eos_token_id=0,
    )
    config._attn_implementation = "sdpa"
    return GPTNeoXForCausalLM(config)


def causal_logits(model: Any, ids: Any) -> Any:
    """Logits [batch, length, vocabulary] of ids [batch, length].

    The same computation as GPTNeoXForCausalLM.forward without its mask building, so that attention takes the plain
    causal path (no mask tensor) and the whole step compiles as one graph.
    """
    import torch

    body = model.gpt_neox
    hidden = body.emb_dropout(body.embed_in(ids))
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    rotary = body.rotary_emb(hidden, position_ids=positions)
    for layer in body.layers:
        hidden = layer(hidden, attention_mask=None, use_cache=False, position_embeddings=rotary)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return model.get_output_embeddings()(body.final_layer_norm(hidden))


def windows(ids: list[int]) -> Iterator[tuple[list[int], int]]:
    """Strided windows of CONTEXT + 1 ids, and how many of each window's last predictions have not been scored yet."""
    scored = 0
    start = 0
    while scored < len(ids) - 1:
        end = min(start + CONTEXT, len(ids) - 1)
        yield ids[start : end + 1], end - scored
        scored = end
        start = end + EVAL_STRIDE - CONTEXT


def bits_per_byte(model: Any, parts: list[bytes]) -> float:
    """Mean cost of a text in bits a byte, over `parts` that are each read from an empty context.

    Windows of CONTEXT tokens advance by EVAL_STRIDE, every token is predicted once, and the document ends inside the
    text are predicted too, their cost spread over the bytes. The model computes in its own dtype.
    """
    import torch

    device = next(model.parameters()).device
    pending: dict[int, list[tuple[list[int], int]]] = collections.defaultdict(list)  # by length, to run as batches
    scored = 0
    for part in parts:
        ids = to_tokens(part)
        scored += sum(token != 0 for token in ids)
        for window, fresh in windows(ids):
            pending[len(window)].append((window, fresh))
    nats = 0.0
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for same_length in pending.values():
            for first in range(0, len(same_length), EVAL_BATCH):
                batch = same_length[first : first + EVAL_BATCH]
                tensor = torch.tensor([window for window, _ in batch], device=device)
                logits = causal_logits(model, tensor[:, :-1]).float().transpose(1, 2)
                costs = torch.nn.functional.cross_entropy(logits, tensor[:, 1:], reduction="none")
                counts = torch.tensor([fresh for _, fresh in batch], device=device)
                is_fresh = torch.arange(costs.shape[1], 0, -1, device=device) <= counts[:, None]
                nats += float((costs * is_fresh).double().sum())
    model.train(was_training)
    return nats / math.log(2) / scored


@dataclass
class Run:
    """One training of one candidate: what was done, how the loss went, and the best weights."""

    architecture: Architecture
    dropout: float
    parameters: int
    steps: int
    tokens: int
    seconds: float
    stopped_by: str
    best_step: int
    curve: list[dict[str, float]]
    state: dict[str, Any]
    validation_bits_per_byte: float = math.inf
    test_bits_per_byte: float = math.inf

    def facts(self) -> dict[str, Any]:
        """The run as it stands in training_log.json."""
        facts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "state"}
        return facts | {"architecture": dataclasses.asdict(self.architecture)}


def train(
    architecture: Architecture, dropout: float, split: Split, settings: Settings, device: str, seconds: float
) -> Run:
    """Train one candidate for settings.steps or `seconds`, whichever ends first; keep its best weights.

    The learning rate follows a cosine over whichever of the two is further along, so a run that time cuts short
    still anneals. Batches are windows at random offsets of the training text.
    """
    import torch

    torch.manual_seed(settings.seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    model = build_model(architecture, dropout).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    on_gpu = device.startswith("cuda")
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.adam_betas, fused=on_gpu)
    picker = torch.Generator().manual_seed(settings.seed)
    text = torch.tensor([token for part in split.train.values() for token in to_tokens(part)], dtype=torch.int16)
    text = text.to(device)
    offsets_within = torch.arange(settings.sequence_length + 1, device=device)

    def autocast() -> Any:  # bf16 on a GPU; a CPU trains in fp32, which most CPUs do faster
        return torch.autocast(device.split(":")[0], dtype=torch.bfloat16, enabled=on_gpu)

    def loss_of(ids: Any) -> Any:
        with autocast():
            logits = causal_logits(model, ids[:, :-1])
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

    torch.compiler.reset()
    step_loss = torch.compile(loss_of, dynamic=False) if settings.compiled else loss_of
    validation = list(split.validation.values())
    run = Run(architecture, dropout, parameters, 0, 0, 0.0, "steps", 0, [], {})
    best = math.inf
    running = torch.zeros((), device=device)
    since_eval = 0
    began = time.monotonic()

    def evaluate() -> None:
        nonlocal best, since_eval
        with autocast():
            measured = bits_per_byte(model, validation)
        trained = float(running) / since_eval / math.log(2)
        run.curve.append({"step": run.steps, "train": round(trained, 4), "validation": round(measured, 4)})
        running.zero_()
        since_eval = 0
        if measured < best:
            best, run.best_step = measured, run.steps
            run.state = {name: value.detach().clone() for name, value in model.state_dict().items()}
        losses = f"train {trained:.4f}  validation {measured:.4f} bits/byte"
        print(f"  step {run.steps:>6}  {losses}  {time.monotonic() - began:6.1f} s", flush=True)

    print(
        f"[{architecture.name} dropout {dropout:g}] {parameters:,} parameters, {settings.steps} steps",
        flush=True,
    )
    model.train()
    try:
        while run.steps < settings.steps:
            progress = max(run.steps / settings.steps, (time.monotonic() - began) / seconds)
            if progress >= 1:
                run.stopped_by = "time"
                break
            rate = learning_rate(settings, run.steps, progress)
            for group in optimizer.param_groups:
                group["lr"] = rate
            last = len(text) - settings.sequence_length
            offsets = torch.randint(last, (settings.batch_size,), generator=picker).to(device)
            loss = step_loss(text[offsets[:, None] + offsets_within].long())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            running += loss.detach()
            since_eval += 1
            run.steps += 1
            if run.steps % settings.eval_every == 0:
                evaluate()
        if since_eval:
            evaluate()
    except KeyboardInterrupt:
        run.stopped_by = "keyboard"
        print("  interrupted: going on with the best weights so far", flush=True)
    if not run.state:
        run.best_step = run.steps
        run.state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    run.tokens = run.steps * settings.batch_size * settings.sequence_length
    run.seconds = round(time.monotonic() - began, 1)
    finished = shipped_model(run).to(device)
    run.validation_bits_per_byte = round(bits_per_byte(finished, validation), 4)
    run.test_bits_per_byte = round(bits_per_byte(finished, list(split.test.values())), 4)
    print(
        f"  best at step {run.best_step}: fp16-rounded weights score {run.validation_bits_per_byte:.4f} (validation), "
        f"{run.test_bits_per_byte:.4f} (test) bits/byte",
        flush=True,
    )
    return run


def learning_rate(settings: Settings, step: int, progress: float) -> float:
    """Linear warm-up over the first steps, then a cosine down to a share of the peak at progress 1."""
    floor = settings.final_learning_rate_share
    cosine = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    warmup = min(1.0, (step + 1) / settings.warmup_steps)
    return settings.learning_rate * warmup * cosine


def shipped_model(run: Run) -> Any:
    """The run's best weights rounded to fp16 and held in fp32, without dropout: what the folder's file will hold."""
    import torch

    model = build_model(run.architecture, dropout=0.0)
    model.load_state_dict({name: value.to("cpu", torch.float16).float() for name, value in run.state.items()})
    return model.eval()


def choose(runs: list[Run]) -> int:
    """The index of the run to ship: the first candidate's best, unless another beats it by FIRST_WINS_WITHIN."""
    first = runs[0].architecture
    chosen = min(
        (i for i, run in enumerate(runs) if run.architecture == first),
        key=lambda i: runs[i].validation_bits_per_byte,
    )
    for i, run in enumerate(runs):
        bar = runs[chosen].validation_bits_per_byte
        if run.architecture != first:
            bar *= 1 - FIRST_WINS_WITHIN if runs[chosen].architecture == first else 1
            if run.validation_bits_per_byte < bar:
                chosen = i
    return chosen


def generate(model: Any, prompt: str, tokens: int, temperature: float | None, seed: int) -> str:
    """`prompt` and its continuation, on the CPU; greedy without a temperature. Generation may end a document early."""
    import torch

    torch.manual_seed(seed)
    ids = torch.tensor([[byte + 1 for byte in prompt.encode("utf-8")]])
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature is not None:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, pad_token_id=0, **sampling
    )[0].tolist()
    return bytes(token - 1 for token in output if token).decode("utf-8", errors="replace")


def export(folder: Path, runs: list[Run], split: Split, settings: Settings, device: str) -> None:
    """Write the model folder for the best of `runs`: weights, config, tokenizer, log, loss curve and card."""
    import torch
    import transformers

    chosen = choose(runs)
    model = shipped_model(runs[chosen])
    folder.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # it is written for its owner alone
    model.float()
    build_tokenizer().save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "clean_up_tokenization_spaces": False,
            "model_max_length": CONTEXT,
        },
    )
    _complete_config(folder / "config.json")
    counts: collections.Counter[str] = collections.Counter()
    for part in split.train.values():
        counts.update(words(part.decode("utf-8").replace(END_OF_TEXT, " ")))
    log = {
        "data": {
            "package": demo_corpus.PACKAGE,
            "version": demo_corpus.PACKAGE_VERSION,
            "package_sha256": demo_corpus.PACKAGE_SHA256,
            "split": {name: _part_facts(getattr(split, name)) for name in ("train", "validation", "test")},
        },
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU",
        },
        "settings": dataclasses.asdict(settings),
        "runs": [run.facts() for run in runs],
        "chosen": chosen,
        "excerpt": {
            "text": split.excerpt,
            "bits_per_byte": round(bits_per_byte(model, [split.excerpt.encode("utf-8")]), 4),
        },
        "common_words": [word for word, _ in counts.most_common(COMMON_WORDS)],
        "samples": {
            "prompt": PROMPT,
            "greedy": generate(model, PROMPT, GREEDY_TOKENS, None, settings.seed),
            "temperature": TEMPERATURE,
            "sampled": generate(model, PROMPT, SAMPLED_TOKENS, TEMPERATURE, settings.seed),
        },
    }
    _write_json(folder / "training_log.json", log)
    write_card(folder)


def write_card(folder: Path) -> None:
    """Write README.md and loss_curve.svg of a model folder from its training_log.json: no figure comes from elsewhere."""
    log = json.loads((folder / "training_log.json").read_text(encoding="utf-8"))
    (folder / "loss_curve.svg").write_text(loss_curve(log), encoding="utf-8")
    (folder / "README.md").write_text(card(log, (folder / "model.safetensors").stat().st_size), encoding="utf-8")


def _complete_config(path: Path) -> None:
    """Add the field names that readers older than transformers 5 know to the rotary settings and the dtype."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config.setdefault("rotary_pct", config["rope_parameters"]["partial_rotary_factor"])
    config.setdefault("rotary_emb_base", config["rope_parameters"]["rope_theta"])
    config.setdefault("torch_dtype", config["dtype"])
    _write_json(path, config)


def _part_facts(part: dict[str, bytes]) -> dict[str, Any]:
    return {
        "bytes": sum(map(len, part.values())),
        "sha256": hashlib.sha256(b"".join(part.values())).hexdigest(),
        "books": {name: len(text) for name, text in part.items()},
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _run_name(run: dict[str, Any]) -> str:
    shape = Architecture(**run["architecture"])
    return f"{shape.name}, dropout {run['dropout']:g}"


def loss_curve(log: dict[str, Any]) -> str:
    """An SVG of bits per byte over steps: the shipped run's training and validation loss, the others' validation."""
    width, height, left, bottom, right, top = 720, 380, 60, 50, 15, 30
    runs = log["runs"]
    points = [point for run in runs for point in run["curve"]]
    last = max((point["step"] for point in points), default=1)
    values = [point[key] for point in points for key in ("train", "validation")] or [1.0]
    low = math.floor(min(values) * 10) / 10
    high = min(max(values), low + 1.2)  # the first steps, far above, would flatten the rest

    def x(step: float) -> float:
        return left + (width - left - right) * step / last

    def y(value: float) -> float:
        return top + (height - top - bottom) * (high - value) / (high - low)

    def line(run: dict[str, Any], key: str, style: str) -> str:
        kept = [point for point in run["curve"] if point[key] <= high]
        path = " ".join(f"{x(point['step']):.1f},{y(point[key]):.1f}" for point in kept)
        return f'<polyline points="{path}" fill="none" {style}/>'

    grid = []
    for tick in range(math.ceil(low * 10), math.floor(high * 10) + 1, 2):
        at = y(tick / 10)
        grid.append(f'<path d="M{left} {at:.1f}H{width - right}" stroke="#ddd"/>')
        grid.append(f'<text x="{left - 8}" y="{at + 4:.1f}" text-anchor="end">{tick / 10:.1f}</text>')
    for quarter in range(5):
        step = last * quarter / 4
        grid.append(f'<text x="{x(step):.1f}" y="{height - bottom + 18}" text-anchor="middle">{step:.0f}</text>')
    lines = [line(run, "validation", 'stroke="#bbb"') for i, run in enumerate(runs) if i != log["chosen"]]
    shipped = runs[log["chosen"]]
    lines.append(line(shipped, "train", 'stroke="#1f77b4" stroke-width="1.5" stroke-dasharray="5 3"'))
    lines.append(line(shipped, "validation", 'stroke="#d62728" stroke-width="2"'))
    legend = [("#d62728", "validation"), ("#1f77b4", "training (with dropout)")]
    if len(runs) > 1:
        legend.append(("#999", "validation of the runs not shipped"))
    keys = [
        f'<text x="{width - right}" y="{top + 16 * (i + 1)}" text-anchor="end" fill="{colour}">{label}</text>'
        for i, (colour, label) in enumerate(legend)
    ]
    view = f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {view}>',
            f'<rect width="{width}" height="{height}" fill="white"/>',
            f'<text x="{left}" y="18" font-size="14">Bits per byte, shipped run: {_run_name(shipped)}</text>',
            *grid,
            *lines,
            *keys,
            f'<text x="{(left + width - right) / 2}" y="{height - 10}" text-anchor="middle">step</text>',
            "</svg>\n",
        ]
    )


def card(log: dict[str, Any], weights_bytes: int) -> str:
    """The model card, every figure of it read from the training log."""
    run = log["runs"][log["chosen"]]
    shape = Architecture(**run["architecture"])
    settings, data, environment, samples = log["settings"], log["data"], log["environment"], log["samples"]
    names = [name.replace("_", " ").title().replace(" And ", " and ") for name in data["split"]["train"]["books"]]
    sizes = {name: part["bytes"] for name, part in data["split"].items()}
    betas = " and ".join(f"{beta:g}" for beta in settings["adam_betas"])
    table = "\n".join(
        f"| {_run_name(r)}{' (shipped)' if r is run else ''} | {r['parameters']:,} | {r['best_step']} of {r['steps']} "
        f"| {r['seconds']:.0f} | {r['validation_bits_per_byte']:.3f} | {r['test_bits_per_byte']:.3f} |"
        for r in log["runs"]
    )
    command, timed = "python3 scripts/train_demo.py", ""
    if settings["minutes"]:
        command += f" --minutes {settings['minutes']:g}"
        timed = f"""
The {settings["minutes"]:g} minutes were shared evenly, so a slower candidate made fewer steps, and how many depends on the
machine's speed; without `--minutes` each run makes its full number of steps.
"""
    return f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# demo: a byte-level GPT-NeoX that writes like a novel

The model that ships inside `clusterfusion`, so that decoding can be tried, tested and timed with no download.
It is really trained: its text is visibly English, in the manner of its one author, and means little.

| | |
| --- | --- |
| class | `GPTNeoXForCausalLM`: parallel residual, biases, exact GELU, untied embeddings |
| shape | hidden size {shape.hidden_size}, {shape.layers} layers, MLP {4 * shape.hidden_size} |
| heads | {shape.heads} of {shape.hidden_size // shape.heads}, rotary on a quarter of each |
| context | {CONTEXT} tokens |
| parameters | {run["parameters"]:,} |
| weights | fp16, {weights_bytes:,} bytes |
| tokens | bytes: `{END_OF_TEXT}` is 0, byte b is b + 1, vocabulary {VOCABULARY}, no merges |
| test loss | {run["test_bits_per_byte"]:.3f} bits per byte |

## Data

Jane Austen's six novels, {sum(sizes.values()):,} bytes:
{", ".join(names)}.
They are in the public domain. They come from the Debian package `{data["package"]}`, version {data["version"]}
(SHA-256 `{data["package_sha256"]}`), of which nothing but
the novels' own words is used: title pages, volume headings and editorial notes are left out, printed lines are
joined into paragraphs, and each chapter ends with `{END_OF_TEXT}`.

Of every book the last {TEST_SHARE:.0%} is **test** ({sizes["test"]:,} bytes in all), the {VALIDATION_SHARE:.0%} before it
**validation** ({sizes["validation"]:,} bytes), the rest training ({sizes["train"]:,} bytes). The validation loss chose the
checkpoint and the candidate; the test text was used for nothing but the figures here. Both come from the same six
books as the training text, so they measure the author's prose, not English at large.

## Training

AdamW (weight decay {settings["weight_decay"]:g}, betas {betas}), {settings["batch_size"]} windows of
{settings["sequence_length"]} bytes a step at random offsets, {settings["warmup_steps"]} steps of warm-up to a learning rate of
{settings["learning_rate"]:g}, then a cosine, gradients clipped at {settings["gradient_clip"]:g}, fp32 weights under bf16 autocast.
On one {environment["device"]}, with torch {environment["torch"]} and transformers {environment["transformers"]}:

| candidate | parameters | best step | seconds | validation bits/byte | test bits/byte |
| --- | --- | --- | --- | --- | --- |
{table}

A candidate is named hidden size x layers x heads. The bits per byte are those of the weights rounded to fp16,
computed in fp32 over windows of {CONTEXT} tokens that advance by {EVAL_STRIDE}. A later candidate is shipped only if its
validation loss beats the first one's by more than {FIRST_WINS_WITHIN:.0%}.

![Loss curve](loss_curve.svg)

To train it again (minutes on one GPU; the text is downloaded through `apt-get`):

    {command}

The seed ({settings["seed"]}) fixes the initial weights, the batches and the dropout, and torch is asked for its
deterministic kernels; that two runs on one machine agree bit for bit has not been checked. Another GPU or another
version of torch sums in another order and ends with other weights and nearly the same loss.
{timed}
## What it writes

Prompt: `{samples["prompt"]}`

Greedy:

{_quote(samples["greedy"])}

Temperature {samples["temperature"]:g}:

{_quote(samples["sampled"])}

## Limits

It knows one author's prose of two centuries ago, spells most of it right, and has no facts, no instructions and no
sense beyond a sentence. It repeats itself when decoded greedily, and knows little outside ASCII. The novels' views
of class, sex and empire are their time's. Use it to see a decoder work, not for its words.

## Licence

The weights: Apache-2.0, like the project. The text they were trained on: public domain.
"""


def _quote(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.split("\n"))


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(
        description="Train the built-in demo model on Jane Austen's novels and write its folder.",
        epilog="Needs torch, transformers, tokenizers and safetensors. With no options: download the text, train four "
        "runs (two architectures, two dropout rates) and ship the best. On a GPU that takes minutes; a CPU can "
        "prove that the script works: --device cpu --steps 5 --batch-size 2 --out /tmp/demo_model",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    files = parser.add_argument_group("files")
    files.add_argument("--out", type=Path, default=MODEL_FOLDER, help="the model folder to write")
    files.add_argument(
        "--corpus-dir", type=Path, default=ROOT / "build" / "demo_corpus",
        help="prepared texts (*.txt, a book each); filled by downloading where it holds none",
    )  # fmt: skip
    files.add_argument("--archive", type=Path, help=f"the .deb of {demo_corpus.PACKAGE}, instead of downloading it")
    files.add_argument("--prepare-only", action="store_true", help="only fill --corpus-dir, train nothing")
    files.add_argument("--card-only", action="store_true", help="only write the card and curve of --out from its log")
    search = parser.add_argument_group("candidates")
    search.add_argument(
        "--candidates", type=Architecture.parse, nargs="+", metavar="HIDDENxLAYERSxHEADS",
        default=[Architecture(256, 4, 4), Architecture(224, 6, 7)],
        help="architectures to train; the first wins near-ties",
    )  # fmt: skip
    search.add_argument("--dropout", type=float, nargs="+", default=[0.1, 0.2], help="rates to try with each")
    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=int, default=6000, help="optimizer steps of each run")
    training.add_argument("--minutes", type=float, help="share this much time among the runs; each still anneals")
    training.add_argument("--batch-size", type=int, default=16, help="windows a step")
    training.add_argument("--sequence-length", type=int, default=CONTEXT, help="bytes a window")
    training.add_argument("--learning-rate", type=float, default=2e-3, help="peak learning rate")
    training.add_argument("--weight-decay", type=float, default=0.1, help="of the matrices; vectors have none")
    training.add_argument("--eval-every", type=int, default=200, help="steps between validation losses")
    training.add_argument("--seed", type=int, default=20261123, help="of weights, batches, dropout and sampling")
    training.add_argument("--device", default="auto", help="cuda, cpu, or auto: a GPU where there is one")
    training.add_argument("--no-compile", action="store_true", help="do not torch.compile the step (a CPU never does)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit status is 1 where the text cannot be had."""
    arguments = parse_arguments(argv)
    if arguments.card_only:
        write_card(arguments.out)
        return 0
    try:
        if not any(arguments.corpus_dir.glob("*.txt")):
            demo_corpus.prepare(arguments.corpus_dir, arguments.archive)
        split = split_books(demo_corpus.load(arguments.corpus_dir))
    except (demo_corpus.CorpusError, OSError) as error:
        print(f"train_demo: {error}", file=sys.stderr)
        return 1
    for name in ("train", "validation", "test"):
        print(f"{name}: {sum(map(len, getattr(split, name).values())):,} bytes", flush=True)
    if arguments.prepare_only:
        return 0

    import torch

    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = Settings(
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        sequence_length=arguments.sequence_length,
        learning_rate=arguments.learning_rate,
        final_learning_rate_share=0.02,
        warmup_steps=max(1, min(200, arguments.steps // 10)),
        weight_decay=arguments.weight_decay,
        adam_betas=(0.9, 0.95),
        gradient_clip=1.0,
        eval_every=arguments.eval_every,
        seed=arguments.seed,
        compiled=device.startswith("cuda") and not arguments.no_compile,
        minutes=arguments.minutes,
    )
    plan = [(architecture, dropout) for architecture in arguments.candidates for dropout in arguments.dropout]
    deadline = time.monotonic() + 60 * arguments.minutes if arguments.minutes else math.inf
    runs: list[Run] = []
    for position, (architecture, dropout) in enumerate(plan):
        share = (deadline - time.monotonic()) / (len(plan) - position)
        if share <= 0:
            print("no time is left for the other runs", flush=True)
            break
        runs.append(train(architecture, dropout, split, settings, device, share))
        if choose(runs) == position:
            export(arguments.out, runs, split, settings, device)
    export(arguments.out, runs, split, settings, device)  # once more, so that the log has every run
    shipped = runs[choose(runs)]
    print(
        f"shipped {shipped.architecture.name} with dropout {shipped.dropout:g}: "
        f"{shipped.test_bits_per_byte:.4f} bits/byte on the test text, in {arguments.out}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
