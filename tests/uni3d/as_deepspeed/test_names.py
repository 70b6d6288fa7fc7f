"""Each name of DeepSpeed's is real, or raises an error that says what to use; and `deepspeed` itself."""

import importlib
import operator
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import uni3d
import uni3d.deepspeed as deepspeed
from uni3d.deepspeed.names import PROVIDED, REFUSED, STAND_INS

ROOT = Path(__file__).resolve().parents[3]

NAMES = """
initialize init_distributed add_config_arguments tp_model_init DeepSpeedEngine PipelineEngine PipelineModule
DeepSpeedConfig runtime.config.DeepSpeedConfig runtime.zero.config.ZeroStageEnum
zero comm ops runtime utils accelerator checkpointing pipe checkpoint get_accelerator add_tuning_arguments
OnDevice logger log_dist
zero.Init zero.GatheredParameters zero.register_external_parameter zero.MiCS_Init zero.ZeroParamStatus
comm.init_distributed comm.get_rank comm.get_world_size comm.get_local_rank comm.barrier comm.all_reduce
comm.broadcast comm.all_gather comm.reduce_scatter comm.is_initialized comm.ReduceOp comm.new_group
comm.all_gather_into_tensor comm.get_world_group comm.comm.all_reduce
pipe.PipelineModule pipe.LayerSpec pipe.TiedLayerSpec runtime.pipe.module.LayerSpec
ops.adam.FusedAdam ops.adam.DeepSpeedCPUAdam ops.lion.FusedLion ops.lion.DeepSpeedCPULion
ops.adagrad.DeepSpeedCPUAdagrad ops.adam.cpu_adam.DeepSpeedCPUAdam
runtime.lr_schedules.WarmupLR runtime.lr_schedules.VALID_LR_SCHEDULES runtime.engine.DeepSpeedEngine
runtime.utils.see_memory_usage runtime.utils.move_to_device runtime.zero.GatheredParameters
runtime.zero.partition_parameters.ZeroParamStatus
runtime.zero.partition_parameters.zero_wrapper_for_fp_tensor_constructor
runtime.zero.partition_parameters._orig_torch_arange
runtime.activation_checkpointing.checkpointing.checkpoint checkpointing.configure
utils.logger utils.log_dist utils.RepeatingLoader utils.safe_get_full_fp32_param utils.safe_set_local_grad
utils.groups.get_data_parallel_group utils.groups._get_data_parallel_world_size utils.set_z3_leaf_modules
utils.instrument_w_nvtx utils.zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint utils.logging.logger
checkpoint.utils.clone_tensors_for_torch_save accelerator.get_accelerator
"""
IMPORTED = NAMES.split()
"""Names that scripts, transformers and accelerate import."""

NOT_HERE = {
    "init_inference": "vLLM",
    "InferenceEngine": "uni3d export",
    "moe.experts.Experts": "expert parallelism isn't supported",
    "ops.lamb.FusedLamb": "use FusedAdam",
    "ops.op_builder.EvoformerAttnBuilder": "no extensions to build",
    "profiling.flops_profiler.get_model_profile": "torch.profiler",
    "runtime.pipe.topology.Nothing": "engine.grid",
    "runtime.sequence_parallel.ulysses_sp.UlyssesSPAttentionHF": "parallel.sequence_parallel",
    "runtime.zero.stage3.estimate_zero3_model_states_mem_needs_all_live": "uni3d plan",
    "launcher.runner.DEEPSPEED_ENVIRONMENT_NAME": "torchrun",
    "runtime.lr_schedules.WarmupLr": "did you mean WarmupLR?",
    "zero.Initt": "did you mean Init?",
    "utils.nothing_like_it": "in deepspeed.utils there are OnDevice, RepeatingLoader",
    "frobnicate": "in deepspeed there are",
}


NAMED = [f"{module}.{name}" for module, names in STAND_INS.items() for name in names]


def import_from(full: str) -> object:
    """Run `from uni3d.deepspeed.X import y`."""
    module, _, name = f"uni3d.deepspeed.{full}".rpartition(".")
    scope: dict[str, object] = {}
    exec(f"from {module} import {name}", scope)
    return scope[name]


@pytest.mark.parametrize("full", IMPORTED)
def test_real_names(full: str) -> None:
    found = import_from(full)
    value: object = deepspeed
    for part in full.split("."):
        value = getattr(value, part)
    assert found is value


def test_the_whole_table_is_real() -> None:
    for path, names in PROVIDED.items():
        module = importlib.import_module(f"uni3d.deepspeed.{path}".rstrip("."))
        assert all(hasattr(module, name) for name in names)
        assert set(names) <= set(dir(module))
    provided = {f"{path}.{name}".lstrip(".") for path, names in PROVIDED.items() for name in names}
    assert not provided & REFUSED.keys()
    assert deepspeed.DeepSpeedEngine is uni3d.Engine


@pytest.mark.parametrize(
    "full", [*NOT_HERE, *(name for name in REFUSED if not {name} & {*PROVIDED, *NOT_HERE, *NAMED})]
)
def test_names_that_are_not_here(full: str) -> None:
    with pytest.raises(ImportError) as caught:
        import_from(full)
    message = str(caught.value)
    assert message.startswith("deepspeed.")
    assert NOT_HERE.get(full, REFUSED.get(full, "")) in message
    with pytest.raises(AttributeError, match="isn't part of uni3d"):
        operator.attrgetter(full)(deepspeed)


@pytest.mark.parametrize("full", NAMED)
def test_names_that_only_stand_in(full: str) -> None:
    found: Any = import_from(full)
    assert found.__name__ == full.rpartition(".")[2]
    assert not isinstance(3, found)
    with pytest.raises(NotImplementedError) as caught:
        found()
    assert str(caught.value) == found.__doc__
    assert str(caught.value).startswith(f"deepspeed.{full} isn't part of uni3d: ")


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True)


INSTALL = "import uni3d.deepspeed; uni3d.deepspeed.install(); uni3d.deepspeed.install()\n"


@pytest.mark.slow
def test_install() -> None:
    done = run(
        INSTALL
        + "import importlib.metadata, importlib.util, packaging.version\n"
        + "assert 'torch' not in sys.modules\n"
        + "import deepspeed, deepspeed.runtime.utils, deepspeed.comm as dist\n"
        + "from deepspeed.runtime.lr_schedules import WarmupLR\n"
        + "from deepspeed.accelerator import get_accelerator\n"
        + "from deepspeed import zero\n"
        + "assert deepspeed is uni3d.deepspeed and zero is uni3d.deepspeed.zero\n"
        + "assert WarmupLR is uni3d.deepspeed.runtime.lr_schedules.WarmupLR\n"
        + "assert importlib.util.find_spec('deepspeed') and importlib.util.find_spec('deepspeed.zero')\n"
        + "found = importlib.metadata.version('deepspeed')\n"
        + "assert found == deepspeed.__version__ == importlib.metadata.metadata('deepspeed')['Version']\n"
        + "assert packaging.version.parse(found) >= packaging.version.parse('0.19.6')\n"
        + "assert 'deepspeed' in importlib.metadata.packages_distributions()\n"
        + "assert not dist.is_initialized()\n"
        + "try: from deepspeed.moe.experts import Experts\n"
        + "except ImportError as error: print(error)\n"
        + "try: import deepspeed.frobnicate\n"
        + "except ImportError as error: print(error)\n"
    )
    assert done.returncode == 0, done.stderr
    moe, other = done.stdout.splitlines()
    assert "expert parallelism isn't supported" in moe
    assert other.startswith("deepspeed.frobnicate isn't part of uni3d; in deepspeed there are")


def test_install_beside_the_real_one(tmp_path: Path) -> None:
    (tmp_path / "deepspeed.py").write_text("here = 1")
    path = f"sys.path.insert(0, {str(tmp_path)!r})\n"
    done = run(path + "import deepspeed\n" + INSTALL)
    assert done.returncode
    assert "DeepSpeed itself was imported" in done.stderr
    assert "before anything imports deepspeed" in done.stderr
    done = run(path + INSTALL + "import deepspeed; print(deepspeed.__version__)")
    assert done.stdout.strip() == deepspeed.__version__, "it comes before one that is only installed"


def test_without_install_nothing_is_claimed() -> None:
    done = run(
        "import uni3d.deepspeed.zero, importlib.metadata\n"
        "assert 'deepspeed' not in sys.modules\n"
        "try: importlib.metadata.version('deepspeed')\n"
        "except importlib.metadata.PackageNotFoundError: print('none')\n"
        "try: import deepspeed\n"
        "except ModuleNotFoundError as error: print(error)\n"
    )
    assert done.stdout.splitlines() == ["none", "No module named 'deepspeed'"], done.stderr


HUGGING_FACE = """
import torch, deepspeed
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.integrations import deepspeed as glue
assert glue.is_deepspeed_available()
config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=50, n_positions=16)
torch.manual_seed(0)
plain = GPT2LMHeadModel(config)
plain.save_pretrained(sys.argv[1])
class Alive:
    config = {
        "train_batch_size": 2, "zero_optimization": {"stage": 3}, "parallel": {"device": "cpu"},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}, "gradient_clipping": 0.0,
        "bf16": {"enabled": True},
    }
    def is_zero3(self):
        return True
alive = Alive()
glue.set_hf_deepspeed_config(alive)
model = GPT2LMHeadModel.from_pretrained(sys.argv[1])
assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
fresh = GPT2LMHeadModel._from_config(config)
assert fresh.transformer.h[0].attn.c_attn.weight.std() > 0.01
model.resize_token_embeddings(60, mean_resizing=False)
assert torch.equal(model.lm_head.weight[:50], plain.lm_head.weight)
engine, *_ = deepspeed.initialize(model=model, config=alive.config)
tokens = torch.randint(50, (2, 8))
engine.backward(engine(input_ids=tokens, labels=tokens).loss)
engine.step()
with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
    assert engine.module.generate(tokens[:1], max_new_tokens=2, do_sample=False).shape == (1, 10)
"""


@pytest.mark.slow
def test_transformers_loads_under_zero_3(tmp_path: Path) -> None:
    """Weights of `from_pretrained` and `_from_config` are real while the config of ZeRO-3 is alive."""
    pytest.importorskip("transformers")
    code = f"import warnings, sys; sys.path.insert(0, {str(ROOT)!r})\n{INSTALL}{HUGGING_FACE}"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
