"""A check that the keys of a command that name paths hold texts, or lists of texts where several are possible."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from cellmap_lightning.errors import CellMapTypeError

#: Keys with one path, of each command; keys that a command lacks are not checked.
_ONE = {
    "evaluate": ("prediction", "trained", "raw", "out"),
    "tune": ("out", "trained"),
    "segment": ("input", "out", "tuned", "raw"),
    "convert": ("input", "output"),
    "submit": ("predictions", "manifest", "out", "tuned"),
    "export": ("ckpt", "out"),
    "predict": ("ckpt", "out", "manifest", "search_path", "tuned", "data.input_path"),
    "train": ("resume", "init_from", "data.csv_path", "data.manifest", "data.search_path"),
    "preview": ("out", "data.csv_path", "data.manifest", "data.search_path"),
    "inspect": ("data.csv_path", "data.manifest", "data.search_path"),
}
#: Keys with a path or a list of paths.
_SEVERAL = {"evaluate": ("truth",), "tune": ("prediction", "truth"), "predict": ("truth",)}


def check_paths(cfg: DictConfig, command: str) -> None:
    """Check the keys of a command that name paths.

    Args:
        cfg: the composed configuration.
        command: the command, such as ``evaluate``.

    Raises:
        CellMapTypeError: a key holds something else than a path, or than a list of paths where several are possible.
    """
    for key in _ONE.get(command, ()):
        value = _value(cfg, key)
        computed = isinstance(value, dict) and "_target_" in value  # as by the demo, which writes its crops
        if not (value is None or isinstance(value, str) or computed):
            raise CellMapTypeError(f"{key} must be one path, got {value!r}{_quoted(key, value)}")
    for key in _SEVERAL.get(command, ()):
        value = _value(cfg, key)
        listed = value if isinstance(value, list) else [value]
        if value is not None and not (listed and all(isinstance(path, str) and path for path in listed)):
            raise CellMapTypeError(f"{key} must be a path or a list of paths, got {value!r}{_quoted(key, value)}")


def _value(cfg: DictConfig, key: str) -> Any:
    value = OmegaConf.select(cfg, key, throw_on_resolution_failure=False)
    return OmegaConf.to_container(value, resolve=False) if OmegaConf.is_config(value) else value


def _quoted(key: str, value: Any) -> str:
    """Return the remedy for a folder whose name is a number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"; of a folder with that name give {key}=./{value}" if is_number else ""
