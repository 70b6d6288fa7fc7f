"""Settings of `parallel.build` from a config. Loads no torch."""

from __future__ import annotations

from parallel.settings import Compile, Precision, Recompute, Settings
from uni3d.config import Config


def parallel_settings(config: Config) -> Settings:
    """Return the config's settings for the parallel package."""
    p, again, compiled = config.parallel, config.activation_checkpointing, config.compile
    options = {"mode": compiled.mode, "dynamic": compiled.dynamic}
    return Settings(
        seed=config.seed,
        zero_stage=config.zero_optimization.stage,
        precision=Precision(compute=config.precision, reduce=config.communication_data_type or "fp32"),
        offload=config.offload,
        persistence_threshold=config.zero_optimization.stage3_param_persistence_threshold,
        schedule=p.schedule,
        virtual_stages=p.virtual_stages,
        balance=p.balance,
        sequence_parallel=p.sequence_parallel,
        recompute=None if again.mode == "none" else Recompute(mode=again.mode, every=again.every),
        compile=Compile(backend=compiled.backend, options=options) if compiled.enabled else None,
    )
