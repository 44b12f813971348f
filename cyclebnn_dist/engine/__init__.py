"""Engines: what turns a loss into an agreed update of the weights."""

from cyclebnn_dist.engine.ddp import DDPEngine
from cyclebnn_dist.engine.deepspeed import DeepSpeedEngine
from cyclebnn_dist.engine.protocol import Engine, Stateful

__all__ = ["DDPEngine", "DeepSpeedEngine", "Engine", "Stateful"]
