"""The attention half of a layer on the CPU, against a plain formula; and what it would launch on a GPU."""

from __future__ import annotations

import ctypes
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import tiny_llama
from torch import Tensor

from clusterfusion.architecture import DecoderConfig
from clusterfusion.jit.decoder_block import LayerArguments
from clusterfusion.jit.tensor_map import TensorMap
from clusterfusion.ops import attention_half as module
from clusterfusion.ops.attention_half import AttentionWeights, NewToken, attention_half
from clusterfusion.ops.layer_launch import LayerScratch, RotaryTables
from clusterfusion.plan import BlockPlan, plan_block
from clusterfusion.plan.limits import H200

ORDERS = ("output_major", "input_major")


def config_of(pairing: str = "halves", **options: Any) -> DecoderConfig:
    config = DecoderConfig.from_dict(tiny_llama(**options).config.to_dict())
    return dataclasses.replace(config, rotary=dataclasses.replace(config.rotary, neighbours=pairing == "neighbours"))


@dataclasses.dataclass(frozen=True)
class Case:
    config: DecoderConfig
    weights: AttentionWeights
    x: Tensor
    k_cache: Tensor
    v_cache: Tensor
    cos: Tensor
    sin: Tensor

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        return attention_half(self.config, self.weights, self.x, self.k_cache, self.v_cache, self.cos, self.sin)


def make_case(config: DecoderConfig, order: Any, tokens: int, width: int, dtype: torch.dtype = torch.float16) -> Case:
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(dtype)

    def matrix(rows: int, columns: int) -> Tensor:
        made = random(rows, columns, scale=columns**-0.5)
        return made if order == "output_major" else made.T.contiguous()

    c = config
    weights = AttentionWeights(
        norm=random(c.hidden_size),
        q=matrix(c.q_size, c.hidden_size),
        k=matrix(c.kv_size, c.hidden_size),
        v=matrix(c.kv_size, c.hidden_size),
        o=matrix(c.hidden_size, c.q_size),
        order=order,
    )
    caches = (random(c.num_kv_heads, tokens, c.head_dim) for _ in range(2))
    angles = 6 * torch.rand(1, width, generator=generator)
    return Case(config, weights, random(1, c.hidden_size), *caches, angles.cos(), angles.sin())


def formula(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """The half in float64, head by head."""
    c, w = case.config, case.weights
    matrices = [m.double() if w.order == "output_major" else m.double().T for m in (w.q, w.k, w.v, w.o)]
    x = case.x.double()[0]
    normed = x / (x.square().mean() + c.norm_eps).sqrt() * w.norm.double()
    half = c.head_dim // 2
    pairs = [(2 * i, 2 * i + 1) if c.rotary.neighbours else (i, i + half) for i in range(half)]
    cos, sin = case.cos.double()[0], case.sin.double()[0]

    def rotate(head: Tensor) -> Tensor:
        turned = head.clone()
        for number, (a, b) in enumerate(pairs):
            at_a, at_b = (number, number) if len(cos) == half else (a, b)
            turned[a] = head[a] * cos[at_a] - head[b] * sin[at_a]
            turned[b] = head[b] * cos[at_b] + head[a] * sin[at_b]
        return turned

    q, k, v = ((m @ normed).view(-1, c.head_dim) for m in matrices[:3])
    k = torch.stack([rotate(head) for head in k])
    attended = []
    for number, query in enumerate(q):
        of = number // (c.num_heads // c.num_kv_heads)
        keys = torch.cat((case.k_cache[of].double(), k[of][None]))
        values = torch.cat((case.v_cache[of].double(), v[of][None]))
        scores = keys @ rotate(query) / math.sqrt(c.head_dim)
        attended.append(scores.softmax(0) @ values)
    return (matrices[3] @ torch.cat(attended))[None], k, v


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("pairing", ["halves", "neighbours"])
@pytest.mark.parametrize("per_dimension", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 37])
def test_against_float64(order: str, pairing: str, per_dimension: bool, tokens: int) -> None:
    config = config_of(pairing)
    case = make_case(config, order, tokens, config.head_dim // (1 if per_dimension else 2))
    before = case.k_cache.clone(), case.v_cache.clone()
    for got, exact in zip(case.run(), formula(case), strict=True):
        assert got.dtype == torch.float16 and got.shape == exact.shape
        torch.testing.assert_close(got.double(), exact, rtol=1e-3, atol=2e-3)
    assert torch.equal(case.k_cache, before[0]) and torch.equal(case.v_cache, before[1])


def test_bfloat16() -> None:
    config = config_of()
    case = make_case(config, "output_major", 5, config.head_dim // 2, torch.bfloat16)
    for got, exact in zip(case.run(), formula(case), strict=True):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), exact, rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("order", ORDERS)
def test_autocast_changes_nothing(order: str) -> None:
    config = config_of()
    case = make_case(config, order, 9, config.head_dim)
    expected = case.run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = case.run()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_no_gradient_is_recorded() -> None:
    config = config_of()
    case = make_case(config, "output_major", 2, config.head_dim)
    case.weights.q.requires_grad_()
    assert not any(t.requires_grad for t in case.run())


# -- what is launched --------------------------------------------------------------------------------------------------


class NoError:
    address = 64


@pytest.fixture
def maps(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The tensors that maps are made of, in place of maps, which take a driver."""
    made: list[Tensor] = []

    def cache_map(plan: BlockPlan, dtype: str, cache: Tensor) -> Any:
        made.append(cache)
        return TensorMap()

    monkeypatch.setattr(module, "cache_map", cache_map)
    return made


def token_of(case: Case) -> NewToken:
    c = case.config
    new = torch.full((2, c.num_kv_heads, c.head_dim), torch.nan, dtype=torch.float16)
    position = torch.tensor([case.k_cache.shape[1]], dtype=torch.int32)
    half = c.head_dim // 2
    tables = RotaryTables(case.cos, case.sin, 0, half if case.cos.shape[1] != half else 0)
    return NewToken(case.x[0], case.k_cache, case.v_cache, position, tables, *new)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("tokens", [0, 1, 37])
def test_arguments(maps: list[Tensor], order: str, tokens: int) -> None:
    config = config_of()
    case = make_case(config, order, tokens, config.head_dim)
    plan, token = plan_block(config, H200), token_of(case)
    scratch = LayerScratch(plan, torch.float16, torch.device("cpu"))
    got = module.half_arguments(plan, case.weights, token, scratch, NoError())  # type: ignore[arg-type]
    assert got.cache.max_len == tokens + 1 and got.position == token.position.data_ptr()
    assert (got.cache.k_cache, got.cache.v_cache) == (token.k_new.data_ptr(), token.v_new.data_ptr())
    assert (got.cache.head_stride, got.cache.token_stride) == (config.head_dim, 0)
    assert got.cache.k_new is None and got.cache.v_new is None and got.out is None
    mapped = (case.k_cache, case.v_cache) if tokens else (token.k_new, token.v_new)
    assert [t.data_ptr() for t in maps] == [t.data_ptr() for t in mapped]
    assert all(t.shape == (config.num_kv_heads, max(tokens, 1), config.head_dim) for t in maps)
    assert got.layer.norm1_weight == case.weights.norm.data_ptr()
    for name in "qkvo":
        expected = getattr(case.weights, name).data_ptr() if order == "output_major" else None
        assert getattr(got.layer, f"{name}_weight") == expected
    assert got.workspace.second_angles == config.head_dim // 2 and got.workspace.table_stride == 0
    assert got.middle == scratch.tensors["middle"].data_ptr() and got.x == token.x.data_ptr()


Launch = Callable[[LayerArguments], None]


def launching(monkeypatch: pytest.MonkeyPatch, launches: dict[str, Launch]) -> None:
    """Launches that do what `launches` say, with the arguments as they are then."""

    def prepare_layer(plan: BlockPlan, w: Any, x: Any, segments: Any, arguments: Any, index: int) -> list[Any]:
        return [lambda which=which: launches[which](arguments) for which in segments]

    monkeypatch.setattr(module, "prepare_layer", prepare_layer)


def test_the_segments_add_zero_in_the_place_of_x(maps: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of()
    case = make_case(config, "output_major", 3, config.head_dim)
    plan, token, order = plan_block(config, H200), token_of(case), []
    scratch = LayerScratch(plan, torch.float16, torch.device("cpu"))
    arguments = module.half_arguments(plan, case.weights, token, scratch, NoError())  # type: ignore[arg-type]
    sums = torch.linspace(-1, 1, config.hidden_size)

    def vector(address: int) -> Tensor:
        size = 2 * config.hidden_size
        return torch.frombuffer(bytearray(ctypes.string_at(address, size)), dtype=torch.float16)

    def project(now: LayerArguments) -> None:
        order.append("project")
        assert torch.equal(vector(now.x), token.x)

    def output(now: LayerArguments) -> None:
        order.append("output")
        scratch.tensors["middle"].copy_(vector(now.x).float() + sums)

    launching(monkeypatch, {"project": project, "attend": lambda _: order.append("attend"), "output": output})
    got = module.launch_segments(plan, case.weights, token, scratch, arguments, 0)
    assert order == ["project", "attend", "output"] and torch.equal(got, sums.half())


@pytest.mark.parametrize("tokens", [0, 1, 700])
@pytest.mark.parametrize("options", [{}, {"num_attention_heads": 4, "num_key_value_heads": 4}])
def test_products_around_an_attend_that_a_cpu_does(
    maps: list[Tensor], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], tokens: int
) -> None:
    """`attend` in plain PyTorch, over the scratch alone, its tiles dealt to the clusters as the program deals them."""
    config = config_of("neighbours", **options)
    case = make_case(config, "input_major", tokens, config.head_dim)
    plan, token = plan_block(config, H200), token_of(case)
    scratch = LayerScratch(plan, torch.float16, torch.device("cpu"))
    c, group = config, config.num_heads // config.num_kv_heads
    exact, k, v = formula(case)

    def attend(_: LayerArguments) -> None:
        rows = scratch.tensors["qkv"].view(torch.float32)[: c.num_kv_heads * plan.group_rows]
        heads = rows.view(c.num_kv_heads, group + 2, c.head_dim).double()
        even, odd = heads[..., 0::2], heads[..., 1::2]
        cos, sin = case.cos.double()[0], case.sin.double()[0]
        turned = heads.clone()
        turned[..., 0::2] = even * cos[0::2] - odd * sin[0::2]
        turned[..., 1::2] = odd * cos[1::2] + even * sin[1::2]
        torch.testing.assert_close(turned[:, group], k, rtol=1e-3, atol=4e-3)
        torch.testing.assert_close(heads[:, group + 1], v, rtol=1e-3, atol=4e-3)
        partials = torch.full((c.num_heads, plan.partials_per_head, c.head_dim + 4), torch.nan)
        for head in range(c.num_heads):
            of = head // group
            query = turned[of, head % group] / math.sqrt(c.head_dim) * math.log2(math.e)
            for part in range(plan.used_partials(tokens)):
                tiles = [t // plan.tile_tokens % plan.active_splits(tokens) // plan.merged_ctas for t in range(tokens)]
                mine = [t for t, cluster in enumerate(tiles) if cluster == part]
                keys, values = case.k_cache[of, mine].double(), case.v_cache[of, mine].double()
                if part == 0:
                    keys = torch.cat((keys, turned[of, group][None]))
                    values = torch.cat((values, heads[of, group + 1][None]))
                scores = keys @ query
                weights = torch.exp2(scores - scores.max())
                partials[head, part, : c.head_dim] = weights @ values
                partials[head, part, c.head_dim], partials[head, part, c.head_dim + 1] = scores.max(), weights.sum()
        scratch.tensors["partials"].view(torch.float32)[: partials.numel()].copy_(partials.flatten())

    launching(monkeypatch, {"attend": attend})
    arguments = module.half_arguments(plan, case.weights, token, scratch, NoError())  # type: ignore[arg-type]
    got = module.launch_between_products(plan, case.weights, token, scratch, arguments, 0)
    torch.testing.assert_close(got.double(), exact[0], rtol=2e-3, atol=4e-3)
