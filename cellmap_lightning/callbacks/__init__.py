"""Callbacks for a Lightning Trainer."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cellmap_lightning.callbacks.data_wait_monitor import DataWaitMonitor
    from cellmap_lightning.callbacks.last_checkpoint import LastCheckpoint
    from cellmap_lightning.callbacks.loss_monitor import LossMonitor
    from cellmap_lightning.callbacks.preemption import PreemptionCheckpoint
    from cellmap_lightning.callbacks.preview import BatchPreview
    from cellmap_lightning.callbacks.stream_prefetch import StreamPrefetch
    from cellmap_lightning.checkpointing.checkpoint_config import CheckpointConfig
    from cellmap_lightning.prediction.options import (
        BlendOptions,
        ChannelOptions,
        OutputOptions,
        RegionOptions,
        ResumeOptions,
    )
    from cellmap_lightning.prediction.prediction_writer import PredictionWriter, make_prediction_writer

_HOMES = {
    "BatchPreview": "callbacks.preview",
    "BlendOptions": "prediction.options",
    "ChannelOptions": "prediction.options",
    "CheckpointConfig": "checkpointing.checkpoint_config",
    "DataWaitMonitor": "callbacks.data_wait_monitor",
    "LastCheckpoint": "callbacks.last_checkpoint",
    "LossMonitor": "callbacks.loss_monitor",
    "PredictionWriter": "prediction.prediction_writer",
    "PreemptionCheckpoint": "callbacks.preemption",
    "RegionOptions": "prediction.options",
    "ResumeOptions": "prediction.options",
    "OutputOptions": "prediction.options",
    "StreamPrefetch": "callbacks.stream_prefetch",
    "make_prediction_writer": "prediction.prediction_writer",
}

__all__ = [
    "BatchPreview",
    "BlendOptions",
    "ChannelOptions",
    "CheckpointConfig",
    "DataWaitMonitor",
    "LastCheckpoint",
    "LossMonitor",
    "OutputOptions",
    "PredictionWriter",
    "PreemptionCheckpoint",
    "RegionOptions",
    "ResumeOptions",
    "StreamPrefetch",
    "make_prediction_writer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"cellmap_lightning.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
