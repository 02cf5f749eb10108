"""The command ``cellmap-tune``."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from cellmap_lightning.commands.program import run_command
from cellmap_lightning.errors import (
    CellMapFileExistsError,
    CellMapFileNotFoundError,
    CellMapKeyError,
    CellMapValueError,
)
from cellmap_lightning.validation import did_you_mean, first_few


def main() -> Any:
    """Run ``cellmap-tune``: search the parameters of a segmentation that score best on annotated crops."""
    return run_command("tune", lambda configs: _tune(configs[0]))


def _tune(cfg: DictConfig) -> None:
    from cellmap_lightning.evaluation.challenge import INSTANCE_CLASSES
    from cellmap_lightning.evaluation.evaluate import annotated_crops
    from cellmap_lightning.evaluation.tuning import Tuner, read_crop, settings_of
    from cellmap_lightning.instances.options import SegmentationOptions
    from cellmap_lightning.instances.source import open_source

    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    name, out, truth = str(settings["class"]), Path(settings["out"]), Path(settings["truth"])
    if out.exists() and not settings["overwrite"]:
        raise CellMapFileExistsError(f"{out} exists; set overwrite=true to replace it, or another out=...")
    if not truth.is_dir():
        raise CellMapFileNotFoundError(f"truth={truth} does not exist; give the folder of the annotated crops")
    source = open_source(str(settings["prediction"]), name, settings["kind"], values=settings["values"])
    folders = annotated_crops(truth, name, source.lattice)
    if not folders:
        raise CellMapKeyError(f"truth={truth}: no crop in it annotates {name!r} and lies in the prediction")
    chosen, held_out = _divided([folder.name for folder in folders], settings["crops"], settings["held_out"])
    crops = {f.name: read_crop(source, f, name, settings["unknown"]) for f in folders if f.name in (*chosen, *held_out)}
    tuner = Tuner(
        source, [crops[c] for c in chosen], [crops[c] for c in held_out], settings["metric"],
        SegmentationOptions(method=settings["method"]), name in (settings["instance_classes"] or INSTANCE_CLASSES),
    )  # fmt: skip
    result = tuner.run(_progress)
    if sys.stderr.isatty():
        sys.stderr.write("\n")
    out.parent.mkdir(parents=True, exist_ok=True)
    kind = {} if settings["kind"] is None else {"kind": settings["kind"]}
    parameters = {name: {**kind, **settings_of(result.options, list(tuner.lists))}}
    out.write_text(yaml.safe_dump(parameters, sort_keys=False), encoding="utf-8")
    print(f"\n{yaml.safe_dump(parameters, sort_keys=False)}")
    metric = settings["metric"]
    print(f"{metric:<8}{'default':>10}{'tuned':>10}")
    print(f"{'search':<8}{result.default:>10.3f}{result.score:>10.3f}  {', '.join(chosen)}")
    if math.isnan(result.held_out):
        print("no crop was held out: on new data the score will be lower")
    else:
        print(f"{'held out':<8}{result.held_out_default:>10.3f}{result.held_out:>10.3f}  {', '.join(held_out)}")
    print(f"\n{result.combinations} combinations were computed\n{out}")


def _progress(text: str) -> None:
    """Show the latest combination in one line of a terminal."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{text[:78]:<78}")


def _divided(names: Sequence[str], crops: Any, held_out: Any) -> tuple[list[str], list[str]]:
    """Return the crops of the search, and those held out: by name, or the last ones of a number.

    Raises:
        CellMapKeyError: there is no such crop.
        CellMapValueError: none is left for the search.
    """
    for crop in (*(crops or []), *(held_out if isinstance(held_out, list) else [])):
        if crop not in names:
            raise CellMapKeyError(
                f"there is no annotated crop {crop!r}; there are {first_few(names, 12)}" + did_you_mean(crop, names)
            )
    if isinstance(held_out, bool) or not (held_out is None or isinstance(held_out, int | list)) or held_out == -1:
        raise CellMapValueError(f"held_out must be names of crops or a number of them, got {held_out!r}")
    others = list(held_out) if isinstance(held_out, list) else _last_crops(names, crops or [], int(held_out or 0))
    chosen = [name for name in (crops or names) if name not in others]
    if not chosen:
        raise CellMapValueError("held_out: no crop is left for the search; hold out fewer of them")
    return chosen, others


def _last_crops(names: Sequence[str], searched: Sequence[str], number: int) -> list[str]:
    """Return the last crops outside of the search, up to a number; one is left where the search names none."""
    pool = [name for name in names if name not in searched]
    count = min(number, len(pool) if searched else len(pool) - 1)
    return pool[len(pool) - count :] if count > 0 else []
