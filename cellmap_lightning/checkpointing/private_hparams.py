"""Hyperparameters of a module, saved without the secrets in its ``storage_options``."""

import inspect
from collections.abc import Sequence
from types import FrameType
from typing import Any

from lightning.pytorch.core.mixins.hparams_mixin import HyperparametersMixin

from cellmap_lightning.redaction import redacted


class PrivateHyperparameters(HyperparametersMixin):
    """Lightning's hyperparameters, saved and logged without secrets; see docs/reliability.md."""

    def save_hyperparameters(
        self,
        *args: Any,
        ignore: Sequence[str] | str | None = None,
        frame: FrameType | None = None,
        logger: bool = True,
    ) -> None:
        """Save arguments of ``__init__`` as ``hparams``, see Lightning, with secrets replaced by ``***``."""
        here = inspect.currentframe()  # Lightning reads the arguments from the caller's frame
        super().save_hyperparameters(
            *args, ignore=ignore, frame=frame or (here.f_back if here else None), logger=logger
        )
        for saved in (self._hparams, vars(self).get("_hparams_initial", {})):
            for name, value in saved.items():
                safe = redacted({name: value})[name] if isinstance(value, dict | list | str) else value
                if safe != value:
                    saved[name] = safe
