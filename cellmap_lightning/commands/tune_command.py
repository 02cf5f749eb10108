"""The command ``cellmap-tune``."""

import logging
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from cellmap_lightning.commands.program import run_command
from cellmap_lightning.errors import CellMapFileExistsError
from cellmap_lightning.io.files import make_folder
from cellmap_lightning.validation import first_few

log = logging.getLogger(__name__)

#: Names of trained crops that a note lists, at most.
_NAMED = 12
_NOT_HELD_OUT = (
    "no crop was held out: these are scores of the crops that were searched; on other crops they will be lower"
)


def main() -> Any:
    """Run ``cellmap-tune``: search the parameters of a segmentation that score best on annotated crops."""
    return run_command("tune", lambda configs: _tune(configs[0]))


def _tune(cfg: DictConfig) -> None:
    from cellmap_lightning.evaluation.challenge import INSTANCE_CLASSES
    from cellmap_lightning.evaluation.crop_parts import is_trained, trained_crops
    from cellmap_lightning.evaluation.held_out import split_crops
    from cellmap_lightning.evaluation.predicted_crops import predicted_crops
    from cellmap_lightning.evaluation.tuning import Tuner, check_alike, read_crop, settings_of
    from cellmap_lightning.instances.options import SegmentationOptions

    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    name, out, metric = str(settings["class"]), Path(settings["out"]), settings["metric"]
    if out.exists() and not settings["overwrite"]:
        raise CellMapFileExistsError(f"{out} exists; set overwrite=true to replace it, or another out=...")
    pairs = {
        crop.name: crop
        for crop in predicted_crops(
            settings["prediction"], settings["truth"], name, settings["kind"], settings["values"]
        )
    }  # fmt: skip
    parts = None if settings["trained"] is None else trained_crops(Path(settings["trained"]))
    trained = [crop for crop, pair in pairs.items() if is_trained(parts, pair.annotation)]
    chosen, held_out = split_crops(list(pairs), settings["crops"], settings["held_out"], trained)
    _report_division(chosen, held_out, settings)
    _report_trained(chosen, held_out, trained)
    used = {crop: pairs[crop] for crop in (*chosen, *held_out)}
    check_alike({crop: pair.source for crop, pair in used.items()})
    crops = {
        crop: read_crop(pair.source, pair.annotation, name, settings["unknown"], crop) for crop, pair in used.items()
    }
    tuner = Tuner(
        used[chosen[0]].source, [crops[c] for c in chosen], [crops[c] for c in held_out], metric,
        SegmentationOptions(method=settings["method"]), name in (settings["instance_classes"] or INSTANCE_CLASSES),
    )  # fmt: skip
    result = tuner.run(_progress)
    if sys.stderr.isatty():
        sys.stderr.write("\n")
    make_folder(out.parent)
    kind = {} if settings["kind"] is None else {"kind": settings["kind"]}
    parameters = {name: {**kind, **settings_of(result.options, list(tuner.lists))}}
    text, advice = yaml.safe_dump(parameters, sort_keys=False), _advice(result.held_out_default, result.held_out)
    out.write_text(f"# {advice}\n{text}" if advice else text, encoding="utf-8")
    print(f"\n{text}")
    print(f"{metric:<8}{'default':>10}{'tuned':>10}")
    print(f"{'search':<8}{result.default:>10.3f}{result.score:>10.3f}  {_listed(chosen, trained)}")
    if math.isnan(result.held_out):
        print(_NOT_HELD_OUT)
    else:
        print(f"{'held out':<8}{result.held_out_default:>10.3f}{result.held_out:>10.3f}  {_listed(held_out, trained)}")
    if set(trained) & set(used):
        print("* trained on")
    if advice:
        print(f"\n{advice}")
    print(f"\n{result.combinations} combinations were computed\n{out}")


def _advice(default: float, tuned: float) -> str | None:
    """Return a sentence about parameters that are worse on the held-out crops than the defaults; None for others."""
    if not tuned < default:
        return None
    return (
        f"on the held-out crops these parameters are worse than the defaults ({default:.3f} to {tuned:.3f}): keep the "
        "defaults, or search on other crops"
    )


def _listed(crops: Sequence[str], trained: Sequence[str]) -> str:
    """Return the names of crops, with a mark on those that were trained on."""
    return ", ".join(f"{crop} *" if crop in trained else crop for crop in crops)


def _progress(text: str) -> None:
    """Show the latest combination in one line of a terminal."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{text[:78]:<78}")


def _report_division(chosen: Sequence[str], held_out: Sequence[str], settings: Mapping[str, Any]) -> None:
    """Log what the search uses, where that is less than what was asked for."""
    if not held_out:
        only = f"{chosen[0]} alone is predicted and annotated" if len(chosen) == 1 and settings["crops"] is None else ""
        log.warning(
            "no crop is held out%s: parameters may fit the crops of the search alone, and their score says nothing "
            "about others; predict several annotated crops, cellmap-predict crops=[...], and give their folder",
            f" ({only})" * bool(only),
        )
    elif isinstance(settings["held_out"], int) and len(held_out) < settings["held_out"]:
        log.warning("held_out=%s: %s crops are held out, since there are no more", settings["held_out"], len(held_out))


def _report_trained(chosen: Sequence[str], held_out: Sequence[str], trained: Sequence[str]) -> None:
    """Warn of crops that the network was trained on, whose predictions are better than those of other volumes."""
    unused = [crop for crop in trained if crop not in (*chosen, *held_out)]
    if unused:
        log.info("left out (trained on): %s", first_few(unused, _NAMED))
    for key, crops, what in (
        ("crops", chosen, "parameters fit predictions that are better than elsewhere"),
        ("held_out", held_out, "the held-out score is too high"),
    ):
        used = [crop for crop in crops if crop in trained]
        if used:
            log.warning(
                "the network was trained on %s: %s; choose others with %s=[...]", first_few(used, _NAMED), what, key
            )
