"""Runs whose data need credentials: Hydra's files and logs without them, and a folder for its owner alone."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cellmap_lightning.redaction import hidden, hide_overrides, holds_credentials, redacted, secrets_of

#: Secrets of this process's configuration, which no line of a log or an error holds.
_secrets: set[str] = set()


def hide(text: str) -> str:
    """Return a text without the secrets of this run."""
    return hidden(text, _secrets)


def hold_secrets(arguments: list[str]) -> bool:
    """Tell whether a command line may hold secrets."""
    return any(hide_overrides(argument) != argument for argument in arguments)


def without_secrets(config: Any) -> Any:
    """Return a configuration, as plain containers, without the secrets of this run."""
    return redacted(config, _secrets)


def protect_logs(arguments: list[str]) -> None:
    """Hide credentials in every log record of this process; with credentials among its arguments, make files private.

    Args:
        arguments: the command line.
    """
    make = logging.getLogRecordFactory()

    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        made = make(*args, **kwargs)
        try:
            text = made.getMessage()
        except Exception:  # a wrong format: logging reports it
            return made
        safe = hide_overrides(hide(text))
        if safe != text:
            made.msg, made.args = safe, None
        return made

    logging.setLogRecordFactory(record)
    if hold_secrets(arguments):
        os.umask(0o077)  # Hydra and launchers write the arguments before a job starts


def protect_run(cfg: DictConfig) -> None:
    """Remove secrets from the files that Hydra has written for this job, and close its folder to other users.

    Args:
        cfg: the configuration of the job.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra = HydraConfig.get()
    plain = OmegaConf.to_container(cfg, resolve=False)
    overrides = OmegaConf.to_container(hydra.overrides.task)
    if not holds_credentials(plain) and redacted(overrides) == overrides:
        return
    _secrets.update(secrets_of(plain))
    for path in _option_paths(plain):
        try:
            options = OmegaConf.select(cfg, path)
            _secrets.update(secrets_of({"storage_options": _plain(options)}))
        except OmegaConfBaseException:  # reported where the configuration is resolved
            continue
    if hydra.output_subdir is None:
        return
    folder = Path(hydra.runtime.output_dir)
    noted = folder / hydra.output_subdir
    sweep = Path(hydra.sweep.dir) if hydra.mode == RunMode.MULTIRUN else None
    for private in (noted, folder, sweep):
        if private is not None and private.is_dir() and private.resolve() != Path.cwd().resolve():
            private.chmod(0o700)
    if noted.is_dir():
        _write(noted / "config.yaml", plain)
        _write(noted / "hydra.yaml", {"hydra": OmegaConf.to_container(hydra, resolve=False)})
        _write(noted / "overrides.yaml", overrides)
    if sweep is not None and (sweep / "multirun.yaml").is_file():
        _write(sweep / "multirun.yaml", OmegaConf.to_container(OmegaConf.load(sweep / "multirun.yaml"), resolve=False))


def _write(file: Path, content: Any) -> None:
    part = file.with_name(f"{file.name}.{os.getpid()}")  # other processes of the run may read and write it too
    OmegaConf.save(OmegaConf.create(without_secrets(content)), part)
    part.replace(file)


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _option_paths(node: Any, where: str = "") -> Iterator[str]:
    """Yield the key of every ``storage_options`` of a plain configuration."""
    if isinstance(node, dict):
        for key, value in node.items():
            below = f"{where}.{key}" if where else str(key)
            if key == "storage_options":
                yield below
            yield from _option_paths(value, below)
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from _option_paths(value, f"{where}[{number}]")
