"""Hyperparameters of a module, saved without the secrets in its ``storage_options``."""

import inspect
from collections.abc import Sequence
from types import FrameType
from typing import Any

from lightning.pytorch.core.mixins.hparams_mixin import HyperparametersMixin
from omegaconf import OmegaConf

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
                # Not resolved: an interpolation stands for a secret, and does not contain it.
                plain = OmegaConf.to_container(value, resolve=False) if OmegaConf.is_config(value) else value
                safe = redacted({name: plain})[name] if isinstance(plain, dict | list | tuple | str) else plain
                if safe != plain:
                    saved[name] = safe
