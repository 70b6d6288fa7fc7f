"""Fused projections: cut by parts where these are declared, and refused where they seem to be fused."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from marks import slow
from one_stage import run_batch
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import parallel
from parallel.tensor import check_plan, expand_plan

WIDTH, HEAD, FEATURES, VOCABULARY = 16, 4, 12, 11


class Attention(nn.Module):
    """Attention with q, k and v in one projection, cut by whatever size it has."""

    head_dim = HEAD

    def __init__(self, kv_heads: int) -> None:
        super().__init__()
        self.sizes = [WIDTH, kv_heads * HEAD, kv_heads * HEAD]
        self.qkv, self.o = nn.Linear(WIDTH, sum(self.sizes)), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        fused = self.qkv(x)
        ways = sum(self.sizes) // fused.shape[-1]
        q, k, v = (
            part.unflatten(-1, (-1, HEAD)).transpose(1, 2)
            for part in fused.split([size // ways for size in self.sizes], -1)
        )
        k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 2 * FEATURES, bias=False), nn.Linear(FEATURES, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.first(x).chunk(2, -1)
        return self.second(F.silu(gate) * up)


class Layer(nn.Module):
    def __init__(self, kv_heads: int) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(kv_heads), Gated()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


PLAN = {
    "embed": "embedding_rowwise",
    "layers.*.attn.qkv": "colwise",
    "layers.*.attn.o": "rowwise",
    "layers.*.mlp.first": "colwise",
    "layers.*.mlp.second": "rowwise",
    "layers.*.norm*": "sequence_parallel",
    "head": "colwise_logits",
}
GATHERED = {"layers.*.attn": "gather_input", "layers.*.mlp": "gather_input"}


class Net(nn.Module):
    def __init__(self, kv_heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer(kv_heads) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.tp_plan = dict(PLAN)
        sizes = [WIDTH, kv_heads * HEAD, kv_heads * HEAD]
        self.tp_parts: dict[str, Any] = {
            "layers.*.attn.qkv": 3 if kv_heads == 4 else sizes,
            "layers.*.mlp.first": 2,
        }

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

    def loss_fn(self, logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        return F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="sum"), torch.tensor(
            ids.numel()
        )


def net(kv_heads: int = 4) -> Net:
    torch.manual_seed(2)
    return Net(kv_heads)


def batch() -> Tensor:
    return torch.randint(VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(3))


def gradients_case(
    kv_heads: int, plan: dict[str, str], settings: dict[str, Any]
) -> tuple[float, dict[str, Tensor]]:
    model = net(kv_heads)
    model.tp_plan |= plan
    for name, style in plan.items():
        if style == "packed_colwise":
            del model.tp_parts[name]
    topology = parallel.Topology(parallel.Degrees(pp=1, dp=1, tp=2), zero_stage=settings["zero_stage"])
    built = parallel.build(model, topology, parallel.Settings(seed=0, **settings))
    loss = run_batch(built, batch(), batch(), 2)
    built.zero.reshard()
    built.replicas.check(loss)
    gradients = {n: p.grad for n, p in built.module.named_parameters()}
    whole = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients.items()}
    return loss.total.item(), whole


@pytest.mark.parametrize(
    ("kv_heads", "plan", "settings"),
    [
        slow(4, {}, {"zero_stage": 0}),
        (2, {}, {"zero_stage": 3}),
        (4, {"layers.*.mlp.first": "packed_colwise"}, {"zero_stage": 1}),
        slow(2, GATHERED, {"zero_stage": 1, "sequence_parallel": True}),
        (2, {}, {"zero_stage": 2, "sequence_parallel": True, "recompute": parallel.Recompute()}),
    ],
)
def test_each_part_is_cut(
    ranks: Ranks, kv_heads: int, plan: dict[str, str], settings: dict[str, Any]
) -> None:
    model = net(kv_heads)
    loss, _ = model.loss_fn(model(batch()), batch())
    loss.backward()
    for found, gradients in ranks.run(2, gradients_case, kv_heads, plan, settings):
        assert found == pytest.approx(loss.item(), rel=1e-6)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=2e-6, msg=name)


def refusal(
    model: nn.Module,
    plan: dict[str, str],
    parts: dict[str, Any],
    tp: int = 2,
    units: dict[str, int] | None = None,
) -> str:
    with pytest.raises(ValueError, match=r"tp") as caught:
        check_plan(model, expand_plan(model, plan, parts), units or {}, tp, parts=parts)
    return str(caught.value)


def test_an_undeclared_one_is_refused() -> None:
    """The signs are its name, and the size of the layer after it."""
    plan, parts = {n: s for n, s in PLAN.items() if s != "sequence_parallel"}, net().tp_parts
    assert refusal(net(), plan, {"layers.*.mlp.first": 2}) == (
        "tp_plan has 'colwise' for layers.0.attn.qkv, which seems to be several layers in one, by its name: "
        "a rank's slice would mix them; set the model's tp_parts to {'layers.*.attn.qkv': 3} for 3 equal "
        "parts, to their sizes, such as [16, 8, 8], or to 1 if it is one layer or its parts alternate by "
        "heads"
    )
    assert refusal(net(), plan, {"layers.*.attn.qkv": 3}).startswith(
        "tp_plan has 'colwise' for layers.0.mlp.first, which seems to be several layers in one, as "
        "layers.0.mlp.second takes only 12 of its 24 features: a rank's slice would mix them; set the "
        "model's tp_parts to {'layers.*.mlp.first': 2} for 2 equal parts"
    )
    for model in (net(), net(2)):
        check_plan(model, expand_plan(model, plan, model.tp_parts), {}, 2, parts=model.tp_parts)
    check_plan(net(), expand_plan(net(), plan, dict.fromkeys(parts, 1)), {}, 2, parts=dict.fromkeys(parts, 1))


@pytest.mark.parametrize(
    "name",
    [
        "Wqkv",
        "c_attn",
        "in_proj",
        "query_key_value",
        "to_kv",
        "kv_proj",
        "gate_up_proj",
        "w12",
        "w1w3",
        "fused_in",
    ],
)
def test_names_of_fused_projections(name: str) -> None:
    model = nn.ModuleDict({name: nn.Linear(4, 4), "out": nn.Linear(4, 4)})
    assert "by its name" in refusal(model, {name: "colwise", "out": "rowwise"}, {})
    plan = {name: "colwise_gather_output", "out": "rowwise_split_input"}
    check_plan(model, expand_plan(model, plan), {}, 2)


@pytest.mark.parametrize(
    "name", ["q_proj", "k", "wi", "up_proj", "fc1", "gate_proj", "query", "w1", "dense_h_to_4h"]
)
def test_single_layers_pass(name: str) -> None:
    """Also with others of another size beside them, as in a layer without modules for its parts."""
    sizes = {name: 6, "wide": 12, "kept": 4}
    layers = {key: nn.Linear(4, size) for key, size in sizes.items()}
    ends = {f"{key}_out": nn.Linear(size, 4) for key, size in sizes.items()}
    small = {"k": nn.Linear(4, 2)} if name != "k" else {}  # of grouped-query attention
    model = nn.ModuleDict(layers | ends | small)
    plan = dict.fromkeys((*layers, *small), "colwise") | dict.fromkeys(ends, "rowwise")
    check_plan(model, expand_plan(model, plan), {}, 2)


def test_parts_that_do_not_fit() -> None:
    plan = {n: s for n, s in PLAN.items() if s != "sequence_parallel"}
    parts = net().tp_parts
    message = "tp_parts: the 48 features of layers.0.attn.qkv aren't 5 equal parts"
    assert refusal(net(), plan, parts | {"layers.*.attn.qkv": 5}) == message
    message = "tp_parts: [16, 16] don't add up to the 48 features of layers.0.attn.qkv"
    assert refusal(net(), plan, parts | {"layers.*.attn.qkv": [16, 16]}) == message
    message = "tp_parts names 'layers.*.attn.kqv', but Net has no such module"
    assert refusal(net(), plan, parts | {"layers.*.attn.kqv": 3}) == message
    message = "tp(2) doesn't divide the 1 heads of layers.0.attn.qkv (packed_colwise); choose a tp that does"
    assert refusal(net(1), plan, net(1).tp_parts) == message
    message = "tp(4) doesn't divide the 2 heads of layers.0.attn.qkv (packed_colwise); choose a tp that does"
    assert refusal(net(2), plan, net(2).tp_parts, tp=4, units={"layers.*.attn.qkv": 8}) == message
    assert refusal(net(), plan, parts, units={"layers.*.attn.qkv": 4}).startswith(
        "the parts of layers.0.attn.qkv, 16, 16, 16, don't consist of whole units of 12 features"
    ), "by tp_units"


def test_norms_of_whole_features_whose_gradients_would_be_summed() -> None:
    style = "replicated_with_grad_allreduce"
    plan = {n: s for n, s in PLAN.items() if s != "sequence_parallel"} | {"layers.*.norm2": style}
    assert refusal(net(), plan, net().tp_parts) == (
        f"tp_plan has {style!r} for layers.0.norm2, but its 16 features are all that layers.0.attn.qkv "
        "takes, which every rank has: its gradient would count once for each rank; leave it out of the plan, "
        "or use 'sequence_parallel'"
    )
    model, parts = net(), net().tp_parts
    for layer in model.layers:
        layer.attn.head_norm = nn.LayerNorm(HEAD)
    plan = plan | {"layers.*.attn.head_norm": style}
    del plan["layers.*.norm2"]
    check_plan(model, expand_plan(model, plan, parts), {}, 2, parts=parts)


class ByHeads(nn.Module):
    """Attention-like layer that has 4 heads of 4 features on one rank, and of 2 on each of two."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.num_heads = heads
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.q(x).view(*x.shape[:2], self.num_heads, -1)
        return self.o(heads.softmax(-1).flatten(-2))


class BySize(ByHeads):
    head_dim = HEAD

    def forward(self, x: Tensor) -> Tensor:
        heads = self.q(x).view(*x.shape[:2], -1, self.head_dim)
        return self.o(heads.softmax(-1).flatten(-2)) * self.num_heads


def rearrange(x: Tensor, _: str, h: int) -> Tensor:
    return x.unflatten(-1, (h, -1))


class Rearranged(ByHeads):
    def forward(self, x: Tensor) -> Tensor:
        heads = rearrange(self.q(x), "b n (h d) -> b n h d", h=self.num_heads)
        return self.o(heads.softmax(-1).flatten(-2))


def test_shapes_with_the_number_of_all_heads() -> None:
    """A rank would cut its features into as many heads, of fewer features each."""
    plan = {"a.q": "colwise", "a.o": "rowwise"}
    for kind in (ByHeads, Rearranged):
        assert refusal(nn.ModuleDict({"a": kind()}), plan, {}) == (
            "the tp_plan gives each rank a part of the heads of a, whose forward pass shapes them by "
            "self.num_heads (4), the number of all: give the size of a head instead, and -1 for their number"
        )
    for model, units in ((BySize(), {}), (ByHeads(2), {"a.q": 4})):
        check_plan(nn.ModuleDict({"a": model}), plan, units, 2)


class Experts(nn.Module):
    def __init__(self, **parameters: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in parameters.items():
            self.register_parameter(name, nn.Parameter(torch.ones(shape)))


def test_parameters_of_experts_that_the_plan_leaves_out() -> None:
    """A bias would be added once on each rank."""
    model = nn.ModuleDict({"experts": Experts(down=(2, 4, 4), bias=(2, 4))})
    plan = {"experts": "moe_tp_experts", "experts.down": "rowwise"}
    assert refusal(model, plan, {}).startswith(
        "tp_plan has 'moe_tp_experts' for experts but no style for its parameter experts.bias"
    )
    assert refusal(model, plan | {"experts.bias": "colwise"}, {}).startswith(
        "tp_plan has 'colwise' for experts.bias of shape [2, 4]; the weights of experts have the shape"
    )


class Transposed(nn.Module):
    """Experts `(experts, inputs, outputs)`, as Llama 4 stacks them, each with all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(2, WIDTH, 2 * FEATURES) / 4)
        self.down_proj = nn.Parameter(torch.randn(2, FEATURES, WIDTH) / 4)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = (x.unsqueeze(0) @ self.gate_up_proj).chunk(2, -1)
        return ((F.silu(gate) * up) @ self.down_proj).sum(0)


class Mixture(nn.Module):
    tp_plan = {  # noqa: RUF012 - as models declare it
        "experts": "moe_tp_experts",
        "experts.gate_up_proj": "packed_rowwise",
        "experts.down_proj": "colwise",
    }

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.experts, self.loss_fn = nn.Linear(WIDTH, WIDTH), Transposed(), nn.MSELoss()

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(self.first(x))


def tokens() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(6, WIDTH, generator=generator), torch.randn(6, WIDTH, generator=generator)


def mixture_case() -> tuple[float, dict[str, Tensor], tuple[int, ...]]:
    topology = parallel.Topology(parallel.Degrees(pp=1, dp=1, tp=2), zero_stage=1)
    built = parallel.build(Mixture(), topology, parallel.Settings(seed=0, zero_stage=1))
    loss = run_batch(built, *tokens(), 1)
    built.zero.reshard()
    built.replicas.check(loss)
    gradients = {n: p.grad for n, p in built.module.named_parameters()}
    whole = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients.items()}
    return loss.total.item(), whole, tuple(built.module.experts.down_proj.to_local().shape)


def test_transposed_experts(ranks: Ranks) -> None:
    model = Mixture()
    inputs, targets = tokens()
    loss = model.loss_fn(model(inputs), targets)
    loss.backward()
    for found, gradients, shape in ranks.run(2, mixture_case):
        assert found == pytest.approx(loss.item(), rel=1e-6)
        assert shape == (2, FEATURES // 2, WIDTH)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-6, msg=name)
