"""The command ``cellmap-evaluate``."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cellmap_lightning.commands.program import run_command
from cellmap_lightning.errors import (
    CellMapFileExistsError,
    CellMapKeyError,
    CellMapValueError,
    missing_extra,
)
from cellmap_lightning.io.files import make_folder
from cellmap_lightning.io.missing_paths import similar_path
from cellmap_lightning.validation import one_of
from cellmap_lightning.wording import plural

_METRICS = ("voxels", "surface", "instances")


def main() -> Any:
    """Run ``cellmap-evaluate``: compare predictions with annotated crops."""
    return run_command("evaluate", lambda configs: _evaluate(configs[0]))


def _evaluate(cfg: DictConfig) -> None:
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    settings.pop("hydra", None)
    metrics = _metrics(settings["metric"])
    threshold = settings["threshold"]
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 < threshold <= 1:
        raise CellMapValueError(f"threshold must be a probability above 0 and at most 1, got {threshold!r}")
    prediction = Path(settings["prediction"])
    out = Path(settings["out"] or prediction.with_name(f"{prediction.stem}-evaluation"))
    out = out.with_suffix("") if out.suffix in (".csv", ".json", ".png") else out
    files = [out.with_name(out.name + ending) for ending in (".csv", ".json", ".png", "-worst.png")]
    there = [file for file in files if file.exists()]
    if there and not settings["overwrite"]:
        raise CellMapFileExistsError(f"{there[0]} exists; set overwrite=true to replace it, or another out=...")

    from cellmap_lightning.evaluation.evaluate import check_prediction
    from cellmap_lightning.evaluation.predicted_crops import crop_groups

    groups = list(crop_groups(settings["prediction"]).values())
    if groups:
        raise CellMapValueError(
            f"prediction={prediction} holds predictions of {plural(len(groups), 'crop')}; give that of one, as "
            f"{groups[0]}; cellmap-predict crops=[...] evaluate=true scores all of them together"
        )
    classes = check_prediction(prediction, settings["classes"])
    truth = _truth(settings["truth"], prediction, classes)
    _check_surface(metrics, settings["metric"])
    make_folder(out.parent)
    if metrics == ("csc",) and settings["box"] is not None:
        raise CellMapValueError("metric=csc scores whole crops; leave box out, or choose another metric")
    if metrics == ("csc",):
        _evaluate_challenge(settings, prediction, truth, classes, files[0])
    else:
        _evaluate_crops(settings, prediction, truth, classes, metrics, files)


def _truth(setting: str | list[str], prediction: Path, classes: list[str]) -> list[Path]:
    """Return the folders of annotated crops, or of one crop each, after a check.

    Raises:
        CellMapKeyError: one does not exist, or holds no crops.
        CellMapValueError: one is the prediction itself, or a crop is given twice.
    """
    from cellmap_lightning.evaluation.evaluate import crop_folders, is_group

    folders = [Path(folder) for folder in ([setting] if isinstance(setting, str) else setting)]
    annotated: dict[Path, Path] = {}
    for number, given in enumerate(folders):
        truth = given.resolve() if given.name in ("", "..") else given  # a crop is named by its folder
        folders[number] = truth
        if not truth.is_dir():
            raise CellMapKeyError(
                f"truth={truth} does not exist{similar_path(truth)}; give the folder of the annotated crops, or of one "
                "crop"
            )
        if truth.resolve() in (prediction.resolve(), prediction.resolve().parent):
            raise CellMapValueError(f"truth={truth} is the prediction itself; give the folder of the annotated crops")
        crops = crop_folders(truth, classes)
        if not crops:
            raise CellMapKeyError(f"truth={truth} holds no crops: no folder in it has a group per class")
        for crop in (crop for crop in crops if any(is_group(crop / name) for name in classes)):
            other = annotated.setdefault(crop.resolve(), crop)
            if other is not crop:
                raise CellMapValueError(
                    f"truth: the crop {crop.name} is given twice, as {other} and {crop}; give it once"
                )
    return folders


def _metrics(setting: Any) -> tuple[str, ...]:
    """Return the groups of scores; ``("csc",)`` for the challenge's score."""
    names = [setting] if isinstance(setting, str) else list(setting or [])
    if names in (["all"], ["csc"]):
        return _METRICS if names == ["all"] else ("csc",)
    if not names:
        raise CellMapValueError(f"metric must name {', '.join(_METRICS)}, all or csc, got {setting!r}")
    for name in names:
        one_of("metric", name, (*_METRICS, "all", "csc"))
        if name in ("all", "csc"):
            raise CellMapValueError(f"metric={name} stands alone, got {names}")
    return tuple(names)


def _check_surface(metrics: tuple[str, ...], setting: Any) -> None:
    """Check for the library of surface distances before anything is scored.

    Raises:
        MissingExtraError: scipy is not installed.
    """
    if "surface" not in metrics:
        return
    try:
        import scipy.spatial  # noqa: F401
    except ImportError:
        what = f"metric={setting}: surface distances need scipy"
        raise missing_extra("targets", what, "set metric=voxels for Dice, IoU, precision and recall") from None


def _evaluate_crops(
    settings: dict[str, Any],
    prediction: Path,
    truth: list[Path],
    classes: list[str],
    metrics: tuple[str, ...],
    files: list[Path],
) -> None:
    from cellmap_lightning.commands.recorded_raw import draw_over_raw
    from cellmap_lightning.crops.crop_box import CropBox
    from cellmap_lightning.evaluation import evaluate, score_files
    from cellmap_lightning.evaluation.crop_parts import matching_notes, trained_crops
    from cellmap_lightning.evaluation.error_picture import draw_worst
    from cellmap_lightning.evaluation.instance_scores import NoInstancesError

    box = CropBox.parse(settings["box"]) if settings["box"] is not None else None
    trained = trained_crops(Path(settings["trained"])) if settings["trained"] else None

    def score(names: tuple[str, ...]) -> list[evaluate.CropScore]:
        return evaluate.evaluate(
            prediction, truth, classes, settings["threshold"], settings["unknown"], settings["values"], names, trained,
            box,
        )  # fmt: skip

    try:
        scores = score(metrics)
    except NoInstancesError as error:
        if settings["metric"] != "all":
            raise
        print(f"objects are not scored: {error}")
        scores = score(tuple(name for name in metrics if name != "instances"))
    score_files.write_csv(scores, files[0])
    score_files.write_json(scores, files[1])
    score_files.draw(scores, files[2])

    def draw(raw: str | None) -> None:
        draw_worst(scores, prediction, truth, files[3], settings["threshold"], settings["unknown"], settings["values"],
                   raw)  # fmt: skip

    draw_over_raw(draw, settings["raw"], str(prediction), files[3])
    notes = matching_notes(trained, _folders(scores))
    print("\n".join(["", score_files.table(scores), *notes, ""]))
    print("\n".join(str(file) for file in files))


def _evaluate_challenge(
    settings: dict[str, Any], prediction: Path, truth: list[Path], classes: list[str], file: Path
) -> None:
    from cellmap_lightning.evaluation.crop_parts import matching_notes, trained_crops
    from cellmap_lightning.evaluation.csc_evaluation import Predicted, Scoring, csc_table, evaluate_csc, write_csc_csv

    trained = trained_crops(Path(settings["trained"])) if settings["trained"] else None
    scoring = Scoring(settings["threshold"], values=settings["values"], unknown=settings["unknown"])
    score = evaluate_csc([Predicted(prediction, folder, tuple(classes)) for folder in truth], scoring, trained)
    write_csc_csv(score, file)
    print("\n".join(["", csc_table(score), *matching_notes(trained, _folders(score.crops)), "", str(file)]))


def _folders(scores: Iterable[Any]) -> list[Path]:
    """Return the folders of the crops that were scored."""
    return list(dict.fromkeys(score.folder for score in scores))
