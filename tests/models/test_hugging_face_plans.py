"""Plans of Hugging Face's classes: what a config doesn't build, what they leave out, and peft's wrappers."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))  # on the ranks

import hf_models

GROUPED = {"num_key_value_heads": 2}

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "every layer sparse": ("qwen2_moe", GROUPED | {"decoder_sparse_step": 1}),
    "every layer sparse, norms over heads": ("qwen3_moe", GROUPED | {"decoder_sparse_step": 1}),
    "a row of weights for each head": ("cohere", GROUPED | {"use_qk_norm": True}),
    "fused, gathered": ("phi3", GROUPED),
    "fused, alternating by heads": ("gpt_neox", {"rotary_pct": 0.5}),
}


def scattered(model: nn.Module) -> nn.Module:
    """Move the parameters off their initial ones and zeros, which hide faults."""
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def plain_steps(model: nn.Module) -> tuple[list[float], dict[str, Tensor]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, foreach=False, **hf_models.ADAM)
    losses = []
    for batch in hf_models.batches("llama"):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in model.named_parameters()}


def steps_case(kind: str, options: dict[str, Any], dp: int) -> tuple[list[float], dict[str, Tensor]]:
    engine = hf_models.make_engine(scattered(hf_models.make(kind, **options)), 1, dp=dp, tp=2)
    losses, _ = hf_models.train(engine, "llama")
    return losses, hf_models.whole(engine.module)


def compare(found: list[Any], losses: list[float], parameters: dict[str, Tensor]) -> None:
    for found_losses, found_parameters in found:
        assert found_losses == pytest.approx(losses, rel=1e-5)
        assert found_parameters.keys() == parameters.keys()
        for name, parameter in parameters.items():
            torch.testing.assert_close(found_parameters[name], parameter, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_the_steps_are_those_of_one_process(hf_ranks: Ranks, name: str) -> None:
    kind, options = KINDS[name]
    losses, parameters = plain_steps(scattered(hf_models.make(kind, **options)))
    dp = 2 if kind == "cohere" else 1
    compare(hf_ranks.run(2 * dp, steps_case, kind, options, dp), losses, parameters)


def plan_case(kind: str, options: dict[str, Any], plan: dict[str, str]) -> str:
    model: Any = hf_models.make(kind, **options)
    model.tp_plan.update(plan)
    with pytest.raises(ValueError, match="tp_p") as caught:
        hf_models.make_engine(model, 0, tp=2)
    return str(caught.value)


def test_entries_of_ones_own_must_name_something(hf_ranks: Ranks) -> None:
    """Unlike those of a class, which are for all its configs; and they aren't trusted to be split rightly."""
    sparse = GROUPED | {"decoder_sparse_step": 1}
    message = "tp_plan names 'model.layers.*.mlp.gate_prj', but Qwen2MoeForCausalLM has no such module"
    for error in hf_ranks.run(2, plan_case, "qwen2_moe", sparse, {"model.layers.*.mlp.gate_prj": "colwise"}):
        assert error == message
    for error in hf_ranks.run(2, plan_case, "qwen2_moe", sparse, {"model.layers.*.mlp.up_proj": "rowwise"}):
        assert error.startswith("tp_plan names 'model.layers.*.mlp.up_proj', but")
    plan = {"model.layers.*.self_attn.qkv_proj": "colwise", "model.layers.*.self_attn.o_proj": "rowwise"}
    for error in hf_ranks.run(2, plan_case, "phi3", GROUPED, plan):
        assert error.startswith(
            "tp_plan has 'colwise' for model.layers.0.self_attn.qkv_proj, which seems to be several layers"
        )


# --- peft ------------------------------------------------------------------------------------------------


class LoraLayer(nn.Module):
    """`peft.tuners.lora.Linear`: the names and the computation of it."""

    def __init__(self, base: nn.Linear, *, magnitude: bool = False) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_dropout = nn.ModuleDict({"default": nn.Identity()})
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 3, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(3, base.out_features, bias=False)})
        self.lora_embedding_A = nn.ParameterDict()
        nn.init.zeros_(self.lora_B["default"].weight)
        self.lora_magnitude_vector = nn.ModuleDict()
        if magnitude:
            self.lora_magnitude_vector["default"] = nn.Linear(1, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        out = self.base_layer(x)
        low: Tensor = self.lora_B["default"](self.lora_A["default"](self.lora_dropout["default"](x)))
        return out + 2.0 * low


class Passing(nn.Module):
    """Wrapper that passes on attributes, as `peft.PeftModel` and its `LoraModel` do."""

    def __init__(self, name: str, inner: nn.Module) -> None:
        super().__init__()
        self.add_module(name, inner)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if not self._modules:
                raise
            return getattr(next(self.children()), name)

    def forward(self, **batch: Tensor) -> Any:
        return next(self.children())(**batch)


ADAPTED = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj", "qkv_proj")


def adapted(kind: str, *, magnitude: bool = False) -> nn.Module:
    model = scattered(hf_models.make(kind, **GROUPED)).requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        for name, module in list(model.named_modules()):
            owner, _, child = name.rpartition(".")
            if child in ADAPTED:
                assert isinstance(module, nn.Linear)
                setattr(model.get_submodule(owner), child, LoraLayer(module, magnitude=magnitude))
    return Passing("base_model", Passing("model", model))


def adapted_case(kind: str) -> tuple[list[float], dict[str, Tensor]]:
    engine = hf_models.make_engine(adapted(kind), 1, tp=2)
    losses, _ = hf_models.train(engine, "llama")
    return losses, hf_models.whole(engine.module)


@pytest.mark.parametrize("kind", ["llama", pytest.param("phi3", marks=pytest.mark.slow)])
def test_adapters_are_split_with_their_layers(hf_ranks: Ranks, kind: str) -> None:
    losses, parameters = plain_steps(adapted(kind))
    assert next(iter(parameters)).startswith("base_model.model.model.")
    compare(hf_ranks.run(2, adapted_case, kind), losses, parameters)


def magnitude_case() -> str:
    with pytest.raises(ValueError, match="adapter") as caught:
        hf_models.make_engine(adapted("llama", magnitude=True), 1, tp=2)
    return str(caught.value)


def test_other_adapters_are_refused(hf_ranks: Ranks) -> None:
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    for error in hf_ranks.run(2, magnitude_case):
        assert error == (
            f"{layer} (colwise) has an adapter that can't be split: "
            f"{layer}.lora_magnitude_vector.default.weight; tensor parallelism takes plain LoRA of linear "
            "layers"
        )
