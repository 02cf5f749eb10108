"""What plugs into a Trainer beside the data."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cellmap_lightning.callbacks.data_watch import DataWatch
    from cellmap_lightning.callbacks.last_checkpoint import LastCheckpoint
    from cellmap_lightning.callbacks.prediction_writer import PredictionWriter
    from cellmap_lightning.callbacks.preemption import Preemption
    from cellmap_lightning.callbacks.preview import BatchPreview
    from cellmap_lightning.callbacks.run_config import RunConfig
    from cellmap_lightning.callbacks.stream_prefetch import StreamPrefetch

_HOMES = {
    "BatchPreview": "preview",
    "DataWatch": "data_watch",
    "LastCheckpoint": "last_checkpoint",
    "PredictionWriter": "prediction_writer",
    "Preemption": "preemption",
    "RunConfig": "run_config",
    "StreamPrefetch": "stream_prefetch",
}

__all__ = [
    "BatchPreview",
    "DataWatch",
    "LastCheckpoint",
    "PredictionWriter",
    "Preemption",
    "RunConfig",
    "StreamPrefetch",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
