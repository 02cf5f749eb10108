"""The commands: Hydra programs that share ``configs/``.

Neither torch nor Lightning is imported before a job starts, so that ``--help`` answers at once.
"""

import difflib
import importlib
import inspect
import logging
import math
import os
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterator
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import InstantiationException
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from cellmap_lightning.commands.arguments import check_groups, prepared
from cellmap_lightning.commands.common import Stopped, quieten, stop
from cellmap_lightning.commands.ending import Ending
from cellmap_lightning.commands.private_run import hold_secrets, protect_logs, protect_run
from cellmap_lightning.errors import (
    CellMapError,
    CellMapKeyError,
    CellMapTypeError,
    CellMapValueError,
)
from cellmap_lightning.redaction import hide_address
from cellmap_lightning.runtime import interrupts

log = logging.getLogger(__name__)

_HERE = Path(__file__).parents[1]
#: In a wheel the configs lie inside the package, in a checkout beside it.
CONFIGS = next(path for path in (_HERE / "configs", _HERE.parent / "configs") if path.is_dir())

_HYDRA_KEYS = {"_target_", "_partial_", "_convert_", "_recursive_", "_args_"}
_started = False


def register_resolvers() -> None:
    """Make ``${channels:...}``, ``${run_folder:...}`` and ``${classes:...}`` known to the configs."""
    OmegaConf.register_new_resolver("channels", _channels, replace=True)
    OmegaConf.register_new_resolver("run_folder", _run_folder, replace=True, use_cache=True)
    OmegaConf.register_new_resolver("classes", _classes, replace=True)


def _run_folder(name: Any) -> str:
    """The folder of a run below ``runs``: the same for all processes of a run, and for a job that is requeued."""
    if name is not None:
        return str(name)
    if "SLURM_JOB_ID" in os.environ:
        array = os.environ.get("SLURM_ARRAY_JOB_ID")
        job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID')}" if array else os.environ["SLURM_JOB_ID"]
        return f"slurm-{job}"
    torchrun = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return f"torchrun-{torchrun}" if torchrun != "none" else f"{datetime.now():%Y-%m-%d/%H-%M-%S}"


def _channels(targets: Any, classes: Any, name: str | None = None) -> int:
    """Channels of a network for a target, by default the first; one more, for the background, where it is a softmax."""
    first = (targets or {}).get(name or "") or next(iter((targets or {}).values()), None) or {}
    count = len(classes or [None])  # raw only: what comes in goes out
    kind = first.get("kind", "binary")
    return count + 1 if kind == "labels" else count * len(first["offsets"]) if kind == "affinities" else count


def _classes(path: str, group: str | None = None) -> list[str]:
    """The classes that a file of the challenge names, or the parts of one of them."""
    from cellmap_lightning.evaluation.challenge import class_names

    return class_names(path, group)


# Here and not in `_command`: what a launcher such as submitit starts imports this module, and nothing else of it.
register_resolvers()


def train() -> Any:
    """``cellmap-train``: train, validate, and leave checkpoints, curves and pictures in the run's folder."""
    return _command("train", _train)


def inspect_() -> Any:
    """``cellmap-inspect``: say what data are like, what is wrong with them, and which settings fit."""
    return _command("inspect", lambda configs: _inspect(configs[0]), lambda cfg: [_inspection(cfg)])


def preview() -> Any:
    """``cellmap-preview``: draw batches as a training will see them."""
    return _command("preview", _preview)


def predict() -> Any:
    """``cellmap-predict``: write what the model of a checkpoint says of a volume."""
    return _command("predict", _predict, _predictions)


def submit() -> Any:
    """``cellmap-submit``: make a submission to the challenge from predictions."""
    return _command("submit", _submit)


def _command(
    name: str, job: Callable[[Any], Any], prepare: Callable[[DictConfig], list[DictConfig]] | None = None
) -> Any:
    """Run a job under Hydra, with errors that a user can act on; ``prepare`` makes the configurations that it gets."""

    def run(cfg: DictConfig) -> Any:
        global _started
        _started = True
        with Ending():
            return checked(cfg)

    def checked(cfg: DictConfig) -> Any:
        try:
            protect_run(cfg)
            check_groups(OmegaConf.to_container(cfg, resolve=False), CONFIGS)  # type: ignore[arg-type]
            _take_voxel_sizes(cfg, name)
            _check_known(cfg, name)
            configs = [cfg] if prepare is None else prepare(cfg)
            for config in configs:
                _check_missing(config)
                _check_targets(config)
                _check_strides(config)
            return job(cfg if prepare is None else configs)
        except Exception as e:
            cause: BaseException | None = e
            while cause is not None and not isinstance(cause, CellMapError | OmegaConfBaseException):
                if type(cause).__name__ == "MisconfigurationException":  # Lightning's own word for a wrong argument
                    hint = "; trainer=cpu runs without one" if "gpu backend" in str(cause) else ""
                    stop(f"{cause}{hint}")
                cause = cause.__cause__
            if cause is None and isinstance(e, InstantiationException):
                log.debug("where it happened", exc_info=e)
                stop(_refused(e))
            if cause is None:
                if hold_secrets(sys.argv[1:]):  # Hydra would print the arguments
                    stop("".join(traceback.format_exception(e)))
                raise
            log.debug("where it happened", exc_info=e)
            stop(str(cause))

    interrupts.install()
    sys.argv[1:] = [re.sub(r"^\+{0,2}patch\.voxel_size=", "patch.scale=", a) for a in sys.argv[1:]]
    protect_logs(sys.argv[1:])
    try:
        sys.argv[1:] = prepared(name, sys.argv[1:], CONFIGS)
    except CellMapError as e:
        stop(str(e))
    main = hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=name)(run)
    try:
        result = main()
        interrupts.settle()
        return result
    except KeyboardInterrupt:
        stop("interrupted", 130)
    except SystemExit as e:
        if e.code not in (0, None) and not _started and not isinstance(e, Stopped):
            for hint in _hints(name, sys.argv[1:]):
                print(hint, file=sys.stderr)
        raise


# -- what can be said about a config before anything runs


def _take_voxel_sizes(cfg: DictConfig, name: str) -> None:
    """``voxel_size`` in a file of the user is ``scale``, as in the arrays that a dataset is given."""
    from hydra.core.hydra_config import HydraConfig

    arrays = [f"data.{kind}" for kind in ("input_arrays", "target_arrays")]
    specs = [f"{group}.{array}" for group in arrays for array in OmegaConf.select(cfg, group) or {}]
    for where in ["patch", *specs]:
        node = OmegaConf.select(cfg, where)
        if not isinstance(node, DictConfig) or node.get("voxel_size") is None:
            continue
        scale = OmegaConf.to_container(node, resolve=False).get("scale")  # type: ignore[union-attr]
        if where == "patch":
            by_default = scale == OmegaConf.select(OmegaConf.load(CONFIGS / f"{name}.yaml"), "patch.scale")
        else:
            by_default = scale in (None, "${patch.scale}")
        with open_dict(node):
            size = node.pop("voxel_size")
            if any(o.startswith(f"{where}.scale=") for o in HydraConfig.get().overrides.task):
                continue  # what the command line says comes on top
            if not by_default:
                raise CellMapValueError(f"{where} has scale and voxel_size, which are the same; give one of them")
            node.scale = size


def _check_known(cfg: DictConfig, name: str) -> None:
    """Keys that nothing reads: those that the command's own configuration lacks, and that no interpolation refers to.

    What lies below a ``_target_`` is held against its signature instead.

    Raises:
        CellMapKeyError: there are such keys; or an experiment is not in its place.
        CellMapTypeError: something below callbacks or logger that is none.
    """
    own: Any = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{name}.yaml"), resolve=False)
    groups = [key for entry in own.pop("defaults", []) if isinstance(entry, dict) for key in entry]
    own = {key: value for key, value in own.items() if key != "hydra"} | {g: None for g in groups if " " not in g}
    plain: Any = OmegaConf.to_container(cfg, resolve=False)
    if "experiment" in plain:
        raise CellMapKeyError(
            f"the experiment sets experiment.{next(iter(plain['experiment'] or ['...']))} and so on, which nothing "
            "reads: the first line of its file must be '# @package _global_'"
        )
    texts = [value for _, value in _flat(plain) if isinstance(value, str) and "${" in value]

    def unknown(given: dict[str, Any], known: dict[str, Any], where: str) -> Iterator[str]:
        for key, value in given.items():
            path = f"{where}{key}"
            if key not in known:
                pattern = rf"(?<![\w.]){re.escape(path)}(?!\w)|\{{\.+{re.escape(str(key))}(?!\w)"
                if not any(re.search(pattern, text) for text in texts):
                    yield path
            elif isinstance(value, dict) and isinstance(known[key], dict) and "_target_" not in value:
                yield from unknown(value, known[key], f"{path}.")

    keys = [key for key, _ in _flat(own | {g: v for g, v in plain.items() if g in groups}) if "_target_" not in key]
    said = [f"there is no {path!r}{_instead(path, keys, name)}" for path in unknown(plain, own, "")]
    if said:
        raise CellMapKeyError("\n".join(said))
    for group in ("callbacks", "logger"):
        for key, value in (plain.get(group) or {}).items():
            if value is not None and not (isinstance(value, dict) and "_target_" in value):
                raise CellMapTypeError(f"{group}.{key} has no _target_, the class that it is; got {value!r}")


def _instead(path: str, keys: list[str], name: str) -> str:
    """What was probably meant by a key that nothing reads."""
    last = path.rpartition(".")[2]
    same = [key for key in keys if key.rpartition(".")[2] == last]
    close = same[:1] if len(same) == 1 else difflib.get_close_matches(path, keys, 1, 0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; 'cellmap-{name} --cfg job' prints every key"


def _refused(error: InstantiationException) -> str:
    """In a sentence, what a class or function said of the arguments that it was given."""
    key = re.search(r"full_key: (\S+)", str(error))
    target = re.search(r"'([\w.]+)'", str(error))
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = str(cause).strip().splitlines() or [""]
    where = f"{key[1]}: " if key else ""
    return f"{where}{target[1] if target else 'it'} cannot be made: {type(cause).__name__}: {lines[0]}"


def _check_missing(cfg: DictConfig) -> None:
    instead = [OmegaConf.select(cfg, f"data.{name}") for name in ("datasets", "search_path")]
    if any(value is not None for value in instead) and OmegaConf.is_missing(cfg.data, "csv_path"):
        cfg.data.csv_path = None  # crops that are given in another way need no CSV
    # Not OmegaConf.missing_keys: it resolves, and what refers to a missing value would be reported instead of it.
    plain = OmegaConf.to_container(cfg, resolve=False)
    missing = sorted(key for key, value in _flat(plain) if value == "???")
    if missing:
        hints = {"data.csv_path": ", or give data.search_path=... or data.datasets instead"}
        raise CellMapValueError(
            "\n".join(f"{key} is required: set it with {key}=...{hints.get(key, '')}" for key in missing)
        )


def target_nodes(node: Any, where: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every part of a plain config that names a ``_target_``, with its key."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield where, node
        for key, value in node.items():
            yield from target_nodes(value, f"{where}.{key}" if where else str(key))
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from target_nodes(value, f"{where}[{number}]")


def check_target(where: str, node: dict[str, Any]) -> None:
    """Hold the keys of one ``_target_`` node against the signature of what it names.

    Raises:
        CellMapTypeError: there is nothing of that name.
        CellMapKeyError: an argument that it does not take, or one that it needs and does not get.
    """
    path = node["_target_"]
    module, _, name = str(path).rpartition(".")
    try:
        found = importlib.import_module(module)
        target = getattr(found, name)
    except (ImportError, ValueError, AttributeError):
        try:  # a method of a class
            owner, _, cls = module.rpartition(".")
            target = getattr(getattr(importlib.import_module(owner), cls), name)
        except (ImportError, ValueError, AttributeError):
            raise CellMapTypeError(f"{where}._target_: there is no {path!r} to import") from None
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return
    names = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for key in node:
            if key not in names and key not in _HYDRA_KEYS:
                close = difflib.get_close_matches(str(key), names, 1)
                hint = f"; did you mean {where}.{close[0]}?" if close else f"; it takes {', '.join(names)}"
                raise CellMapKeyError(f"{where}.{key}: {name} has no argument {key!r}{hint}")
    if not node.get("_partial_") and not node.get("_args_"):
        needed = [n for n in names if parameters[n].default is inspect.Parameter.empty and n not in node]
        if needed:
            raise CellMapKeyError(f"{where}: {name} needs {', '.join(needed)}")
    if not str(path).startswith("cellmap_lightning."):  # its own classes say themselves what is wrong
        _check_types(where, target, node)


_NUMBERS = (int, float, bool, types.NoneType)


def _check_types(where: str, target: Any, node: dict[str, Any]) -> None:
    """Texts and switches where the annotations ask for numbers alone: most classes would fail on them much later."""
    try:
        hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except Exception:  # annotations that mean something only to their author
        return
    for key, value in node.items():
        hint = hints.get(key)
        kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
        if not all(kind in _NUMBERS or getattr(kind, "__name__", "") == "Tensor" for kind in kinds):
            continue
        names = [kind.__name__ for kind in kinds if kind in _NUMBERS and kind is not types.NoneType]
        wrong = isinstance(value, str | list | dict) or (isinstance(value, bool) and bool not in kinds)
        if names and wrong and "_target_" not in (value if isinstance(value, dict) else ()):
            raise CellMapTypeError(f"{where}.{key} must be {' or '.join(names)}, got {value!r}")


def _check_targets(cfg: DictConfig) -> None:
    for where, node in target_nodes(OmegaConf.to_container(cfg, resolve=True)):
        check_target(where, node)


def _check_strides(cfg: DictConfig) -> None:
    """A U-Net halves its patch and doubles it again: lengths that do not divide come back as others."""
    strides = OmegaConf.select(cfg, "model.strides")
    shape = OmegaConf.select(cfg, "patch.shape")
    if not isinstance(shape, ListConfig):
        return
    lengths = [n for n in shape if n != 1]
    dimensions = OmegaConf.select(cfg, "model.spatial_dims")
    if dimensions is not None and dimensions != len(lengths):
        option = "unet2d" if len(lengths) == 2 else "unet"
        raise CellMapValueError(
            f"patch.shape={list(shape)} has {len(lengths)} dimensions and model.spatial_dims={dimensions}; "
            f"model={option} fits it"
        )
    if not isinstance(strides, ListConfig):
        return
    for axis, length in enumerate(lengths):
        try:
            factor = math.prod(s if isinstance(s, int) else s[axis] for s in strides)
        except (IndexError, TypeError):
            return  # the network itself will say what is wrong with them
        if isinstance(length, int) and length % factor:
            lower = max(length // factor * factor, factor)
            raise CellMapValueError(
                f"patch.shape={list(shape)}: {length} is not a multiple of {factor}, by which "
                f"model.strides={list(strides)} shrinks it; {lower} and {(length // factor + 1) * factor} are"
            )


def _hints(name: str, arguments: list[str]) -> list[str]:
    """For overrides that name no key of the config: the keys that were probably meant."""
    from hydra.core.global_hydra import GlobalHydra

    groups = {path.name for path in CONFIGS.iterdir() if path.is_dir()}
    overrides = [a for a in arguments if "=" in a and not a.startswith("-")]
    chosen = []
    for override in overrides:
        group, _, option = override.partition("=")
        if group in groups and (CONFIGS / group / f"{option}.yaml").exists():
            chosen.append(override)
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(CONFIGS.resolve()), version_base="1.3"):
            cfg = hydra.compose(name, overrides=chosen)
    except Exception:  # the hint must never hide the error it is about
        return []
    keys = [*(key for key, _ in _flat(OmegaConf.to_container(cfg, resolve=False))), *groups]
    hints = []
    slurm = any("submitit" in a or a.endswith("=slurm_ddp") for a in arguments)
    if slurm and not find_spec("submitit"):
        hints.append('Jobs through Slurm need pip install "cellmap-lightning[slurm]".')
    if "-m" in arguments[1:] and not arguments[0].startswith("-"):
        hints.append(f"-m comes first: cellmap-{name} -m {' '.join(a for a in arguments if a != '-m')}")
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        if key in keys or key.startswith("hydra"):
            continue
        close = difflib.get_close_matches(key, keys, 1, 0.6)
        hints.append(
            f"There is no {key!r}; did you mean {close[0]!r}?"
            if close
            else f"There is no {key!r}; 'cellmap-{name} --cfg job' prints every key."
        )
    return hints


def _flat(node: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a plain config, with dots, and its value."""
    if isinstance(node, dict):
        for key, value in node.items():
            below = f"{where}.{key}" if where else str(key)
            yield below, value
            yield from _flat(value, below)


# -- cellmap-train


def _train(cfg: DictConfig) -> float | None:
    from cellmap_lightning.commands.train import run

    return run(cfg)


# -- cellmap-predict


def _predictions(cfg: DictConfig) -> list[DictConfig]:
    from hydra.core.hydra_config import HydraConfig

    from cellmap_lightning.commands.predict import of_crops

    return of_crops(cfg, list(HydraConfig.get().overrides.task))


def _predict(configs: list[DictConfig]) -> None:
    from cellmap_lightning.commands.predict import run_all

    quieten()
    run_all(configs, print)


# -- cellmap-submit


def _submit(cfg: DictConfig) -> None:
    from cellmap_lightning.commands.submit import submit as write

    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    path, missing = write(**settings)
    print(f"\n{path}")
    if missing:
        print(f"not in it, though {cfg.manifest} lists them: {', '.join(missing)}")


# -- cellmap-preview


def _preview(cfg: DictConfig) -> None:
    from hydra.utils import instantiate

    from cellmap_lightning.visualization.preview import collect, write

    quieten()
    if cfg.split not in ("train", "val", "test"):
        raise CellMapKeyError(f"split is train, val or test, got {cfg.split!r}")
    out = Path(cfg.out)
    if out.suffix not in (".png", ".pdf", ".svg"):
        raise CellMapValueError(f"out is a .png, .pdf or .svg file, got {cfg.out!r}; html=true writes a page beside it")
    with instantiate(cfg.data, _convert_="all") as data:
        shown = collect(getattr(data, f"{cfg.split}_dataloader")(), cfg.samples, cfg.epoch, cfg.serve)
        title = f"{cfg.split}, epoch {cfg.epoch}, seed {cfg.seed}"
        written = write(shown, data.classes or (), out, title, cfg.overlay, cfg.html)
    for number, one in enumerate(shown):
        print(f"{one.sample.header}\n  {one.napari}\n  {one.neuroglancer}" + "\n" * (number < len(shown) - 1))
    print("\n" + "\n".join(map(str, written)))


# -- cellmap-inspect


def _inspection(cfg: DictConfig) -> DictConfig:
    """The configuration without what only this command knows of the data, so that the rest can be checked."""
    if cfg.cache not in (None, "list", "clear"):
        raise CellMapKeyError(f"cache is list or clear, got {cfg.cache!r}")
    for name in ("deep", "json"):
        if not isinstance(cfg[name], bool):
            raise CellMapValueError(f"{name} is true or false, got {cfg[name]!r}")
    if cfg.device_gb is not None and not (isinstance(cfg.device_gb, int | float) and cfg.device_gb > 0):
        raise CellMapValueError(f"device_gb must be a positive number of GiB, got {cfg.device_gb!r}")
    found = OmegaConf.create(OmegaConf.to_container(cfg))
    assert isinstance(found, DictConfig)
    if OmegaConf.is_missing(found.data, "csv_path"):
        found.data.csv_path = None
    found.input_path = found.data.pop("input_path")
    sources = {name: found.data[name] for name in ("csv_path", "datasets", "search_path")}
    given = [f"data.{name}" for name, value in {**sources, "input_path": found.input_path}.items() if value is not None]
    if cfg.cache is None and len(given) != 1:
        raise CellMapValueError(
            "say what to look at, in one way: data.csv_path=..., data.input_path=..., data.search_path=... or "
            f"data.datasets=...; or cache=list for what is kept on this machine; got {' and '.join(given) or 'none'}"
        )
    return found


def _inspect(cfg: DictConfig) -> None:
    logging.getLogger("cellmap_lightning").setLevel(logging.ERROR)  # the report says it
    if cfg.cache is not None:
        from cellmap_lightning.inspection.cached_files import clear, listing

        print(listing())
        if cfg.cache == "clear":
            print(clear())
        return
    quieten()
    from cellmap_lightning.batches.memory import gpu_memory
    from cellmap_lightning.inspection.report import inspect as look
    from cellmap_lightning.inspection.report import refuse

    data: Any = OmegaConf.to_container(cfg.data, resolve=True)
    patch: Any = OmegaConf.to_container(cfg.patch, resolve=True)
    size = int(cfg.device_gb * 2**30) if cfg.device_gb is not None else gpu_memory() or 16 << 30
    found = look(data, patch, cfg.input_path, cfg.deep, size)
    print(hide_address(found.json() if cfg.json else str(found)))
    refuse(found)


if __name__ == "__main__":
    train()
