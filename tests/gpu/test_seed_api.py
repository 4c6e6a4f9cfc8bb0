"""The seed's functions on a GPU: true against float64, the same bits in every form, and contexts that end cleanly."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import clusterfusion
from clusterfusion.architecture import DecoderConfig
from clusterfusion.errors import ArgumentError, DeviceError
from clusterfusion.named_shapes import named_shape
from clusterfusion.ops.layer_launch import plan_for
from clusterfusion.random_weights import random_weights, uniform
from clusterfusion.seed_api import graph_context_bytes
from clusterfusion.seed_api.graph_context import GRAPHS_KEPT

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)
ROOM = 2048
CONTEXTS = (0, 16, 512, 1024, 2047)
MODELS = {"pythia_2b8": "pythia-2.8b", "pythia_6b9": "pythia-6.9b"}
CREATE = ("k_cache", "v_cache", "weight_qkv", "weight_o", "mlp_up_weight", "mlp_down_weight")
NOT_IN_A_STEP = ("weight_qkv", "weight_o", "mlp_up_weight", "mlp_down_weight")


@dataclasses.dataclass(frozen=True)
class Case:
    """A model's functions, and arguments for them by the seed's names."""

    model: str
    given: dict[str, Any]

    @property
    def config(self) -> DecoderConfig:
        return named_shape(MODELS[self.model])

    def function(self, name: str) -> Callable[..., Any]:
        return getattr(clusterfusion, f"{self.model}_{name}")

    def layer(self, position: int | Tensor, name: str = "decoder_layer", **changes: Any) -> Any:
        return self.function(name)(**self.given | {"current_seq_len": position} | changes)

    def halves(self, position: int | Tensor) -> tuple[Tensor, ...]:
        """attn_output, mlp_intermediate, k_new, v_new."""
        given = {name: value for name, value in self.given.items() if "down" not in name}
        return self.function("attention_only")(**given, current_seq_len=position)

    def mlp(self, attn_output: Tensor, mlp_intermediate: Tensor) -> Tensor:
        down = (self.given["mlp_down_weight"], self.given["mlp_down_bias"])
        return self.function("mlp_only")(self.given["input"], attn_output, mlp_intermediate, *down)

    def create(self, ctx_id: int = 1, max_seq_len: int = ROOM) -> None:
        tensors = {name: self.given[name] for name in CREATE}
        self.function("create_graph_context")(ctx_id, **tensors, max_seq_len=max_seq_len)

    def step(self, position: int | Tensor, ctx_id: int = 1, **changes: Any) -> tuple[Tensor, Tensor, Tensor]:
        given = {name: value for name, value in (self.given | changes).items() if name not in NOT_IN_A_STEP}
        return self.function("graph_decode_step")(ctx_id, **given, current_seq_len=position)

    def destroy(self, ctx_id: int = 1) -> None:
        self.function("destroy_graph_context")(ctx_id)

    def at(self, seed: int) -> dict[str, Tensor]:
        """Another input and other angles."""
        return activations(self.config, seed)


def activations(config: DecoderConfig, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator(GPU).manual_seed(seed)
    x = torch.randn(1, config.hidden_size, device=GPU, generator=generator)
    x[0, 5] = 30.0  # a channel that sticks out, as in real models
    cos, sin = torch.ones(1, config.head_dim, device=GPU), torch.zeros(1, config.head_dim, device=GPU)
    angles = 6 * torch.rand(1, config.rotary.dim, device=GPU, generator=generator)  # each dimension its own
    cos[:, : config.rotary.dim], sin[:, : config.rotary.dim] = angles.cos(), angles.sin()
    return {"input": x.half(), "cos": cos, "sin": sin}


def make_case(model: str) -> Case:
    config = dataclasses.replace(named_shape(MODELS[model]), num_layers=1, vocab_size=8)
    w = random_weights(config, seed=4, dtype=torch.float16, device=GPU).layers[0]
    k, v = (uniform((ROOM, config.hidden_size), 0.0, 1.0, stream, torch.float16, GPU) for stream in (5, 6))
    weights = {
        "weight_qkv": w.qkv_weight,
        "bias_qkv": w.qkv_bias,
        "weight_o": w.o_weight,
        "bias_o": w.o_bias,
        "ln_weight": w.input_norm_weight[None],
        "ln_bias": w.input_norm_bias[None],
        "post_ln_weight": w.post_norm_weight[None],
        "post_ln_bias": w.post_norm_bias,
        "mlp_up_weight": w.up_weight,
        "mlp_up_bias": w.up_bias,
        "mlp_down_weight": w.down_weight,
        "mlp_down_bias": w.down_bias,
    }
    return Case(model, activations(config, 1) | weights | {"k_cache": k, "v_cache": v})


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest) -> Case:
    return make_case(request.param)


@pytest.fixture
def context(case: Case) -> Iterator[Case]:
    """The case, with a context 1."""
    case.create()
    yield case
    case.destroy()


def same(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# -- truth -------------------------------------------------------------------------------------------------------------


def formula(case: Case, position: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The layer in plain operations of one dtype: the truth in float64, the bar in float16."""
    c, half = case.config, case.config.rotary.dim // 2
    given = {name: value.to(dtype) for name, value in case.given.items()}
    x = given["input"]

    def norm(name: str) -> Tensor:
        weight, bias = (given[f"{name}_{what}"].flatten() for what in ("weight", "bias"))
        return F.layer_norm(x, (c.hidden_size,), weight, bias, c.norm_eps)

    def rotate(t: Tensor) -> Tensor:
        turned = torch.zeros_like(t)
        turned[:, :half], turned[:, half : 2 * half] = -t[:, half : 2 * half], t[:, :half]
        return t * given["cos"] + turned * given["sin"]

    qkv = F.linear(norm("ln"), given["weight_qkv"], given["bias_qkv"]).view(c.num_heads, 3, c.head_dim)
    q, k, v = rotate(qkv[:, 0]), rotate(qkv[:, 1]), qkv[:, 2]
    keys, values = (
        torch.cat((given[name][:position].view(position, c.num_heads, c.head_dim), new[None])).transpose(0, 1)
        for name, new in (("k_cache", k), ("v_cache", v))
    )
    attended = F.scaled_dot_product_attention(q[:, None], keys, values).reshape(1, -1)
    attn_output = F.linear(attended, given["weight_o"], given["bias_o"])
    h = F.gelu(F.linear(norm("post_ln"), given["mlp_up_weight"], given["mlp_up_bias"]))
    output = x + attn_output + F.linear(h, given["mlp_down_weight"], given["mlp_down_bias"])
    return {"output": output, "attn_output": attn_output, "mlp_intermediate": h[0], "k_new": k[None], "v_new": v[None]}


def assert_closer(what: str, ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
    assert ours.shape == exact.shape and ours.dtype == torch.float16, what
    our_error, their_error = ((got.double() - exact).abs() for got in (ours, theirs))
    assert ours.isfinite().all(), what
    ours_mean, theirs_mean = our_error.mean(), their_error.mean()
    assert ours_mean <= theirs_mean, f"{what}: mean {ours_mean:.3e}, PyTorch in float16 {theirs_mean:.3e}"
    ours_max, theirs_max = our_error.max(), their_error.max()
    assert ours_max <= 1.25 * theirs_max, f"{what}: max {ours_max:.3e}, PyTorch in float16 {theirs_max:.3e}"


@pytest.mark.parametrize("position", CONTEXTS)
def test_layers_and_halves_against_truth(case: Case, position: int) -> None:
    exact, theirs = (formula(case, position, dtype) for dtype in (torch.float64, torch.float16))
    output, k_new, v_new = case.layer(position)
    attn_output, h, half_k, half_v = case.halves(position)
    joined = case.mlp(attn_output, h)
    ours = {"output": output, "attn_output": attn_output, "mlp_intermediate": h, "k_new": k_new, "v_new": v_new}
    for what, got in ours.items():
        assert_closer(what, got, theirs[what], exact[what])
    assert_closer("mlp_only of attention_only", joined, theirs["output"], exact["output"])
    assert_closer("k_new of attention_only", half_k, theirs["k_new"], exact["k_new"])
    assert_closer("v_new of attention_only", half_v, theirs["v_new"], exact["v_new"])
    for name, new in (("k_cache", half_k), ("v_cache", half_v)):
        assert torch.equal(case.given[name][position], new.flatten())


def test_mlp_only_against_truth(case: Case) -> None:
    attn_output, h = (
        t.half() for t in (formula(case, 16, torch.float64)[n] for n in ("attn_output", "mlp_intermediate"))
    )
    results = []
    for dtype in (torch.float16, torch.float64):
        x, attention, hidden, weight, bias = (
            t.to(dtype)
            for t in (case.given["input"], attn_output, h, case.given["mlp_down_weight"], case.given["mlp_down_bias"])
        )
        results.append(x + attention + F.linear(hidden, weight, bias))
    assert_closer("mlp_only", case.mlp(attn_output, h), *results)
    assert torch.equal(case.mlp(attn_output, h[None]), case.mlp(attn_output, h))


def test_half_a_layer_writes_one_row(case: Case) -> None:
    before = {name: case.given[name].clone() for name in ("k_cache", "v_cache")}
    _, _, k_new, v_new = case.halves(900)
    before["k_cache"][900], before["v_cache"][900] = k_new.flatten(), v_new.flatten()
    for name, cache in before.items():
        assert torch.equal(case.given[name], cache)


# -- the same bits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", CONTEXTS)
def test_every_form_gives_the_same_bits(context: Case, position: int) -> None:
    fused = context.layer(position)
    assert same(context.layer(position, "decoder_layer_split"), fused)
    assert same(context.step(position), fused), "the first step, which is launched"
    assert same(context.step(position), fused), "the second step, which is replayed"


def test_one_graph_serves_every_position(context: Case) -> None:
    results = []
    for position in (*range(40), 127, 128, 129, 500, 1023, 1024, 2046, 2047, 3, 0):
        new = context.at(position)
        as_tensor = torch.tensor([position], dtype=torch.int32, device=GPU)
        for given in (position, as_tensor, as_tensor.reshape(())):
            results.append((position, new, context.step(given, **new)))
    for position, new, got in results:  # later steps have not overwritten earlier results
        assert same(got, context.layer(position, **new)), f"at {position}"


def test_positions_may_be_tensors_everywhere(case: Case) -> None:
    at = torch.tensor([700], dtype=torch.int32, device=GPU)
    assert same(case.layer(at), case.layer(700))
    assert same(case.layer(at, "decoder_layer_split"), case.layer(700))
    assert same(case.halves(at), case.halves(700))
    assert same(case.halves(at.reshape(())), case.halves(700))


def test_steps_take_whatever_norms_and_biases_come(context: Case) -> None:
    names = ("ln_weight", "bias_qkv", "mlp_up_bias", "mlp_down_bias")
    sets = [{name: context.given[name] * (1 + 0.25 * n) for name in names} for n in range(GRAPHS_KEPT + 2)]
    for vectors in (*sets, *reversed(sets), sets[0], sets[0]):
        assert same(context.step(300, **vectors), context.layer(300, **vectors))


def test_a_caller_may_overwrite_or_drop_what_a_step_was_given(context: Case) -> None:
    context.step(50)
    new = context.at(9)
    expected = context.layer(50, **new)
    position = torch.tensor([50], dtype=torch.int32, device=GPU)
    got = context.step(position, **new)
    position.fill_(51)
    for tensor in new.values():
        tensor.zero_()
    assert same(got, expected)


def test_a_caller_may_capture_steps(context: Case) -> None:
    """Two steps in a graph of the caller's, with nothing run before it, beside the context's own."""
    position = torch.zeros(1, dtype=torch.int32, device=GPU)
    x = context.given["input"].clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = context.step(position, input=x)
        second = context.step(position + 1, input=first[0])
    for at in (0, 1, 33, 1024, 2046):
        position.fill_(at)
        x.copy_(context.at(at)["input"])
        graph.replay()
        got = [tuple(t.clone() for t in step) for step in (first, second)]
        for ours in (context.step, context.layer):
            expected = ours(at, input=x)
            assert same(got[0], expected)
            assert same(got[1], ours(at + 1, input=expected[0]))


def test_a_caller_may_capture_halves(case: Case) -> None:
    position = torch.zeros(1, dtype=torch.int32, device=GPU)
    case.mlp(*case.halves(position)[:2])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        halves = case.halves(position)
        output = case.mlp(*halves[:2])
    for at in (0, 77, 2047):
        position.fill_(at)
        graph.replay()
        expected = case.halves(at)
        assert same((*halves, output), (*expected, case.mlp(*expected[:2])))


def test_steps_in_inference_mode(context: Case) -> None:
    expected = context.layer(20)
    with torch.inference_mode():
        assert same(context.step(20), expected)
    assert same(context.step(20), expected)


# -- contexts ----------------------------------------------------------------------------------------------------------


def test_a_context_takes_the_bytes_it_states(context: Case) -> None:
    context.step(5)  # libraries, and PyTorch for its first graph, take memory once
    context.layer(5)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    context.create(2)
    created = torch.cuda.memory_allocated() - before
    context.step(5, 2)
    stepped = torch.cuda.memory_allocated() - before
    context.destroy(2)
    assert torch.cuda.memory_allocated() == before
    stated = graph_context_bytes(plan_for(context.config, GPU.index))
    assert stated <= created <= stated + 9 * 512, "nine tensors, which the allocator rounds up to 512 bytes each"
    assert stepped - created <= 2 * 512, "what PyTorch may keep for a graph's random numbers"


def test_destroying_waits_for_queued_steps(case: Case) -> None:
    expected = case.layer(1000)
    big = torch.randn(4096, 4096, device=GPU)
    other = torch.cuda.Stream()
    for stream in (torch.cuda.current_stream(), other):
        case.create()
        case.step(1000)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(20):
                big @ big
            got = case.step(1000)
        case.destroy()
        torch.full((1 << 20,), torch.nan, device=GPU)  # takes memory that was freed
        assert same(got, expected)
    with pytest.raises(ArgumentError, match="ctx_id is 1; it must be that of a context"):
        case.step(1000)
    case.create()
    assert same(case.step(1000), expected)
    case.destroy()


def test_contexts_are_not_made_or_ended_in_a_capture(context: Case) -> None:
    context.step(3)
    torch.cuda.synchronize()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        with pytest.raises(ArgumentError, match="cannot be created while"):
            context.create(2)
        with pytest.raises(ArgumentError, match="cannot be destroyed while"):
            context.destroy(1)
        torch.zeros(1, device=GPU)  # a capture of nothing makes PyTorch warn
    assert same(context.step(3), context.layer(3))


def test_a_position_out_of_range_is_told_of(case: Case) -> None:
    case.create(max_seq_len=64)
    caches = [case.given[name].clone() for name in ("k_cache", "v_cache")]
    with pytest.raises(ArgumentError, match="current_seq_len is 64; it must be an int from 0 to 63"):
        case.step(64)
    output, _, _ = case.step(torch.tensor(64, dtype=torch.int32, device=GPU))
    assert output.isnan().all()
    assert same(tuple(caches), (case.given["k_cache"], case.given["v_cache"]))
    for _ in range(2):
        with pytest.raises(DeviceError, match="position 64 of a cache of 64 tokens.*Destroy the context"):
            case.step(5)
    case.destroy()
    attn_output, h, _, _ = case.halves(torch.tensor(ROOM, dtype=torch.int32, device=GPU))
    assert attn_output.isnan().all() and h.isnan().all()
    with pytest.raises(DeviceError, match="position 2048"):
        case.halves(5)
    assert all(result.isfinite().all() for result in case.halves(5)), "it is said once"


def test_contexts_of_many_threads(case: Case) -> None:
    """Each thread has a context and a cache of its own; all share the weights."""
    expected = {at: case.layer(at) for at in range(100, 110)}
    failures: list[object] = []

    def run(ctx_id: int) -> None:
        caches = {name: case.given[name].clone() for name in ("k_cache", "v_cache")}
        mine = Case(case.model, case.given | caches)
        try:
            with torch.cuda.stream(torch.cuda.Stream(GPU)):
                torch.cuda.current_stream().wait_stream(torch.cuda.default_stream(GPU))
                mine.create(ctx_id)
                failures.extend(at for at in range(100, 110) if not same(mine.step(at, ctx_id), expected[at]))
                mine.destroy(ctx_id)
        except Exception as error:
            failures.append(error)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=run, args=(ctx_id,)) for ctx_id in range(10, 14)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_devices_and_addresses_are_checked(context: Case) -> None:
    caches = [context.given[name].clone() for name in ("k_cache", "v_cache")]
    for name in ("weight_qkv", "bias_o", "k_cache", "cos"):
        with pytest.raises(ArgumentError, match=f"^{name} is on cpu; it must be on cuda:0"):
            context.layer(7, **{name: context.given[name].cpu()})
    with pytest.raises(ArgumentError, match="^weight_qkv is on cuda:0; it must be on cpu"):
        context.layer(7, input=context.given["input"].cpu())
    for name in ("weight_o", "ln_bias", "k_cache"):
        tensor = context.given[name]
        shifted = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=GPU)[1:].view(tensor.shape)
        with pytest.raises(ArgumentError, match=f"^{name} is at address 0x.* multiple of 16 bytes"):
            context.layer(7, **{name: shifted})
    with pytest.raises(ArgumentError, match="^current_seq_len is .* on cpu"):
        context.step(torch.tensor(7, dtype=torch.int32))
    with pytest.raises(ArgumentError, match="^k_cache is .*the tensor that the context was created with"):
        context.step(7, k_cache=context.given["k_cache"].clone())
    assert same(tuple(caches), (context.given["k_cache"], context.given["v_cache"]))
