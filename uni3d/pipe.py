"""DeepSpeed's form of a pipeline: a list of layers, or of specs that build them.

    model = PipelineModule(
        layers=[
            TiedLayerSpec("embed", nn.Embedding, 50_000, 512),
            *(LayerSpec(Block, 512) for _ in range(12)),
            TiedLayerSpec("embed", nn.Embedding, 50_000, 512, forward_fn=lambda m, x: x @ m.weight.T),
        ],
        num_stages=2,
        loss_fn=loss,
    )

Parameters have DeepSpeed's names: `3.attn.weight` in the layer with index 3, `tied_modules.embed.weight` in
all layers with the key "embed".

On the CPU, every rank builds the whole model before it is split, and rank 0's values count. Inside `with
torch.device("meta")`, layers take no memory until `initialize` gives each rank its parts. Each layer is then
built once more to fill them, one layer at a time. Its initial values depend on the config's seed and its
index (with `seed_layers` on `base_seed` and its index, as in DeepSpeed), not on the topology.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_REFUSED = {
    "activation_checkpoint_func": "layers are recomputed by torch.utils.checkpoint; leave it out",
    "checkpointable_layers": "all layers with parameters are recomputed; leave it out",
}


class LayerSpec:
    """Spec of a layer that isn't built yet: `typename(*args, **kwargs)`."""

    def __init__(self, typename: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> None:
        self.typename = typename
        self.module_args = args
        self.module_kwargs = kwargs

    def build(self) -> nn.Module:
        """Build a new module."""
        return self.typename(*self.module_args, **self.module_kwargs)


class TiedLayerSpec(LayerSpec):
    """Spec of one of several layers with the same `key`, which share their parameters.

    All parameters of the module are shared, on every topology; DeepSpeed shares all of them within a stage,
    but only those in `tied_weight_attr` between stages. `forward_fn(module, inputs)` is called instead of the
    module.
    """

    def __init__(
        self,
        key: str,
        typename: Callable[..., nn.Module],
        *args: Any,
        forward_fn: Callable[[nn.Module, Any], Any] | None = None,
        tied_weight_attr: str | Sequence[str] = "weight",
        **kwargs: Any,
    ) -> None:
        super().__init__(typename, *args, **kwargs)
        self.key = key
        self.forward_fn = forward_fn
        self.tied_weight_attr = [tied_weight_attr] if isinstance(tied_weight_attr, str) else tied_weight_attr

    def build(self) -> nn.Module:
        """Build a new module.

        Raises:
            ValueError: it has no parameter named as in `tied_weight_attr`.
        """
        module = super().build()
        names = [name for name, _ in module.named_parameters()]
        for name in self.tied_weight_attr:
            if name not in names:
                raise ValueError(
                    f"TiedLayerSpec {self.key!r} ties {name!r}, but its parameters are {', '.join(names)}"
                )
        return module


class PipelineModule(nn.Module):
    """A chain of layers that can be split into pipeline stages; each takes the output of the one before.

    The output is a tensor or a tuple of tensors, which the next layer gets as one argument.
    """

    def __init__(
        self,
        layers: Iterable[LayerSpec | nn.Module | Callable[[Any], Any]],
        num_stages: int | None = None,
        loss_fn: Callable[[Any, Any], Any] | None = None,
        seed_layers: bool = False,
        seed_fn: Callable[[int], Any] | None = None,
        base_seed: int = 1234,
        partition_method: str = "parameters",
        activation_checkpoint_interval: int = 0,
        dynamic_shape: bool = False,
        topology: Any = None,
        **refused: Any,
    ) -> None:
        """Build the layers.

        Args:
            layers: specs, modules, or functions without parameters.
            num_stages: number of pipeline stages; the config's `parallel.pp` can set it instead.
            loss_fn: `(outputs, targets)` -> the mean loss, or the sum of the loss and its number of terms.
            seed_layers: whether each layer is initialized from the seed `base_seed` plus its index.
            seed_fn: called with that seed instead of `torch.manual_seed`.
            partition_method: quantity to balance between stages: "parameters", "uniform" (layers), or
                "type:REGEX" (layers whose class name matches, ignoring case).
            activation_checkpoint_interval: 1 recomputes each layer in the backward pass, 0 none; for other
                intervals see the config's section activation_checkpointing.
            dynamic_shape: accepted for DeepSpeed scripts; shapes may always vary.
            topology: DeepSpeed's `ProcessTopology` with the axes pipe, data and model, in this order: pp, dp
                and tp where the config has none.

        Raises:
            ValueError: an unsupported argument, with the reason.
        """
        super().__init__()
        for key, value in refused.items():
            if key not in _REFUSED:
                raise TypeError(f"PipelineModule has no argument {key!r}")
            if value is not None:
                raise ValueError(f"PipelineModule: {key} isn't supported: {_REFUSED[key]}")
        if activation_checkpoint_interval not in (0, 1):
            raise ValueError(
                f"activation_checkpoint_interval={activation_checkpoint_interval} isn't supported: layers "
                "are recomputed one by one; use 0 or 1, or the config's activation_checkpointing"
            )
        self.topology = topology
        if topology is not None:
            num_stages = _stages_of(topology, num_stages)
        self.num_stages = num_stages
        self.activation_checkpoint_interval = activation_checkpoint_interval
        if loss_fn is not None:
            self.loss_fn = loss_fn
        self._specs = list(layers)
        self._base_seed = base_seed if seed_layers else None
        self._seed_fn = seed_fn or torch.manual_seed
        self.pipeline_layers = list(self._build())
        """Names of the layers, in the order in which they run."""
        self.pipeline_costs = _costs(partition_method, self._links())
        self._seeds: dict[str, int] = {}  # of the layers filled so far
        self._filling: tuple[str, nn.Module] | None = None

    def forward(self, x: Any) -> Any:
        for link in self._links():
            x = link(x)
        return x

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fill the whole parameter `name` of a model that was built on the meta device.

        Its layer is built once, from the generator's seed at the first call for one of its parameters.
        """
        layer = max((n for n in self.pipeline_layers if name.startswith(f"{n}.")), key=len)
        place = self.pipeline_layers.index(layer)
        if self._filling is None or self._filling[0] != layer:
            spec = self._specs[place]
            assert isinstance(spec, LayerSpec), "a built layer isn't on the meta device"
            self._filling = None  # free the last layer before building the next
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                torch.manual_seed(self._seeds.setdefault(layer, generator.initial_seed()))
                self._seed(place)
                self._filling = layer, spec.build()
        with torch.no_grad():
            tensor.copy_(self._filling[1].get_parameter(name.removeprefix(f"{layer}.")))

    def _build(self) -> Iterator[str]:
        """Add the layers and yield their names."""
        self.tied_modules = nn.ModuleDict()
        for place, layer in enumerate(self._specs):
            self._seed(place)
            name = str(place)
            if isinstance(layer, TiedLayerSpec):
                module = layer.build()
                link = module if layer.forward_fn is None else _Applied(module, layer.forward_fn)
                if layer.key not in self.tied_modules:
                    self.tied_modules[layer.key] = link
                    yield f"tied_modules.{layer.key}"
                    continue
                _tie(link, self.tied_modules[layer.key], layer.key)
            elif isinstance(layer, LayerSpec):
                link = layer.build()
            elif isinstance(layer, nn.Module):
                if any(layer is module for module in self.modules()):
                    raise ValueError(
                        f"layer {place} occurs earlier in the list too; use TiedLayerSpec to share it"
                    )
                link = layer
            else:
                link = _Function(layer)
            self.add_module(name, link)
            yield name
        if not self.tied_modules:
            del self.tied_modules

    def _seed(self, place: int) -> None:
        if self._base_seed is not None:
            self._seed_fn(self._base_seed + place)

    def _links(self) -> list[nn.Module]:
        return [self.get_submodule(name) for name in self.pipeline_layers]


class _Function(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Any) -> Any:
        return self.function(x)


class _Applied(nn.Module):
    """A module called through a function; its parameters keep their names."""

    def __init__(self, module: nn.Module, function: Callable[[nn.Module, Any], Any]) -> None:
        super().__init__()
        self._parameters, self._buffers, self._modules = module._parameters, module._buffers, module._modules
        self._non_persistent_buffers_set = module._non_persistent_buffers_set
        self._called = (module, function)  # in a tuple, so that it isn't registered as a submodule
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            self.get_extra_state = module.get_extra_state  # type: ignore[method-assign]
            self.set_extra_state = module.set_extra_state  # type: ignore[method-assign]

    def train(self, mode: bool = True) -> _Applied:
        self._called[0].training = mode  # its submodules are also this module's
        return super().train(mode)

    def forward(self, x: Any) -> Any:
        module, function = self._called
        return function(module, x)


def _stages_of(topology: Any, num_stages: int | None) -> int:
    """Return the number of stages in a topology whose ranks are numbered as they are here."""
    axes, stages = list(topology.get_axis_names()), int(topology.get_dim("pipe"))
    if axes not in (["pipe", "data"], ["pipe", "data", "model"]):
        raise ValueError(
            f"the topology's axes are {', '.join(axes)}; expected pipe, data and, if at all, model"
        )
    if num_stages not in (None, stages):
        raise ValueError(f"num_stages is {num_stages}, but the topology has {stages}; give one of them")
    return stages


def _tie(module: nn.Module, first: nn.Module, key: str) -> None:
    """Give `module` the parameters of the first module with its key."""
    theirs = dict(first.named_parameters())
    for name, parameter in list(module.named_parameters()):
        if name not in theirs or theirs[name].shape != parameter.shape:
            raise ValueError(
                f"TiedLayerSpec {key!r}: {name} has shape {list(parameter.shape)} in one layer, but in the "
                f"first it {f'has {list(theirs[name].shape)}' if name in theirs else 'is missing'}"
            )
        owner, _, attribute = name.rpartition(".")
        module.get_submodule(owner)._parameters[attribute] = theirs[name]


def _costs(method: str, links: Sequence[nn.Module]) -> list[int]:
    """Return the cost of each layer for the split into stages."""
    method = method.lower()
    if method == "uniform":
        return [1] * len(links)
    if method == "parameters":
        return [sum(p.numel() for p in link.parameters() if p.requires_grad) for link in links]
    if not method.startswith("type:"):
        raise ValueError(f"partition_method is {method!r}; expected parameters, uniform or type:REGEX")
    pattern = re.compile(method.removeprefix("type:"), re.IGNORECASE)
    costs = [int(pattern.search(_class_name(link)) is not None) for link in links]
    if not any(costs):
        names = sorted({_class_name(link) for link in links})
        raise ValueError(f"partition_method {method!r} matches none of the layers: {', '.join(names)}")
    return costs


def _class_name(link: nn.Module) -> str:
    if isinstance(link, _Function):
        return getattr(link.function, "__name__", "")
    return type(link._called[0] if isinstance(link, _Applied) else link).__name__
