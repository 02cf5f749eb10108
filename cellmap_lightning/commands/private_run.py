"""Protection of credentials in a run: removed from Hydra's files and logs, in a folder that only its owner can read."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cellmap_lightning.commands.override_form import as_overrides
from cellmap_lightning.redaction import hidden, hide_overrides, holds_credentials, redacted, secrets_of

#: Secrets in the configuration of this process, which are removed from logs and errors.
_secrets: set[str] = set()


def hide(text: str) -> str:
    """Return a text without the secrets of this run."""
    return hidden(text, _secrets)


def contain_secrets(arguments: list[str]) -> bool:
    """Return whether a command line may contain secrets."""
    return any(hide_overrides(argument) != argument for argument in arguments)


def without_secrets(config: Any) -> Any:
    """Return a configuration of plain containers without the secrets of this run."""
    return redacted(config, _secrets)


def protect_logs(arguments: list[str], command: str = "train") -> None:
    """Hide credentials in every log record of this process, and write settings in it as overrides.

    If its arguments contain credentials, make files private.

    Args:
        arguments: the command line.
        command: the command, in whose form settings are named.
    """
    create = logging.getLogRecordFactory()

    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        new = create(*args, **kwargs)
        try:
            text = new.getMessage()
        except Exception:  # logging itself reports a wrong format
            return new
        safe = as_overrides(hide_overrides(hide(text)), command)
        if safe != text:
            new.msg, new.args = safe, None
        return new

    logging.setLogRecordFactory(record)
    if contain_secrets(arguments):
        os.umask(0o077)  # Hydra and launchers write the arguments before a job starts


def protect_run(cfg: DictConfig) -> None:
    """Remove secrets from the files that Hydra has written for this job, and make its folder private.

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
    _add_secrets(cfg, plain)
    if hydra.output_subdir is None:
        return
    folder = Path(hydra.runtime.output_dir)
    subfolder = folder / hydra.output_subdir
    sweep = Path(hydra.sweep.dir) if hydra.mode == RunMode.MULTIRUN else None
    for private in (subfolder, folder, sweep):
        if private is not None and private.is_dir() and private.resolve() != Path.cwd().resolve():
            private.chmod(0o700)
    if subfolder.is_dir():
        _write(subfolder / "config.yaml", plain)
        _write(subfolder / "hydra.yaml", {"hydra": OmegaConf.to_container(hydra, resolve=False)})
        _write(subfolder / "overrides.yaml", overrides)
    if sweep is not None and (sweep / "multirun.yaml").is_file():
        _write(sweep / "multirun.yaml", OmegaConf.to_container(OmegaConf.load(sweep / "multirun.yaml"), resolve=False))


def _add_secrets(cfg: DictConfig, plain: Any) -> None:
    """Add the secrets of a configuration; those of interpolations only appear when the options are resolved."""
    _secrets.update(secrets_of(plain))
    for path in _option_paths(plain):
        try:
            options = OmegaConf.select(cfg, path)
            if OmegaConf.is_config(options):
                options = OmegaConf.to_container(options, resolve=True)
            _secrets.update(secrets_of({"storage_options": options}))
        except OmegaConfBaseException:  # reported where the configuration is resolved
            continue


def _write(file: Path, content: Any) -> None:
    """Replace a file atomically, since other processes of the run may read and write it too."""
    part = file.with_name(f"{file.name}.{os.getpid()}")
    OmegaConf.save(OmegaConf.create(without_secrets(content)), part)
    part.replace(file)


def _option_paths(node: Any, where: str = "") -> Iterator[str]:
    """Yield the key of every ``storage_options`` in a configuration of plain containers."""
    if isinstance(node, dict):
        for key, value in node.items():
            below = f"{where}.{key}" if where else str(key)
            if key == "storage_options":
                yield below
            yield from _option_paths(value, below)
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from _option_paths(value, f"{where}[{number}]")
