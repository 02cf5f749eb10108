"""Pictures and scores of finished predictions, as text and files beside them."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cellmap_lightning.commands.prediction_truth import groundtruth, run_folder, truth_folders
from cellmap_lightning.errors import ChunkError, MissingExtraError
from cellmap_lightning.evaluation.crop_parts import CropPart, matching_notes, run_crops, trained_crops
from cellmap_lightning.evaluation.csc_evaluation import Predicted, Scoring, csc_table, evaluate_csc, write_csc_csv
from cellmap_lightning.evaluation.evaluate import evaluate
from cellmap_lightning.evaluation.overview import draw_prediction
from cellmap_lightning.evaluation.score_files import draw, table, write_csv
from cellmap_lightning.io.own_files import check_replaceable
from cellmap_lightning.io.store import parse_location

_REMOTE = "raw and its crops are not on this machine"
_NOT_CSC = "These are scores of voxels, crop by crop. They are\nnot the challenge's score; metric=csc gives that."


def describe_prediction(cfg: DictConfig, writer: Any, classes: Sequence[str]) -> str:
    """Draw a prediction and compare it with annotated crops, as far as the configuration asks for it.

    Args:
        cfg: the configuration of the prediction, see `effective_config`.
        writer: the `PredictionWriter` that has written it.
        classes: the classes of the data; those that were predicted are drawn and scored.

    Returns:
        Paragraphs with the files and scores.
    """
    classes = writer.classes or [name for name in writer.names if name in classes]
    if writer.only:
        classes = [name for name in classes if name in writer.only]
    if not classes:
        return f"\n\nno picture and no scores: {', '.join(writer.names)} are not probabilities of classes"
    if not isinstance(writer.output, Path):
        return "\n\nno picture: the prediction is not on this machine" if cfg.picture else ""
    text = ""
    with _errors_only():
        if cfg.picture:
            text += f"\n\n{_picture(cfg, writer, classes)}"
        if cfg.evaluate and cfg.metric == "voxels":
            text += f"\n\n{_scores(cfg, writer, classes)}"
    return text


def check_files(configs: Sequence[DictConfig]) -> None:
    """Check that the pictures and scores beside predictions replace no files of another source.

    Args:
        configs: see `effective_config`.

    Raises:
        CellMapFileExistsError: one would, and ``writer.overwrite`` is not set.
    """
    for cfg in configs:
        if "://" in str(cfg.writer.output) or cfg.writer.get("overwrite"):
            continue
        output = Path(cfg.writer.output)
        files = [output.with_name(f"{output.stem}.png")] if cfg.picture else []
        if cfg.evaluate:
            files += [_challenge_file(cfg)] if cfg.metric == "csc" else list(_score_files(output))
        check_replaceable(files, f"out={output}", "choose another out=..., move that file, or set overwrite=true")


def _score_files(output: Path) -> tuple[Path, Path]:
    """Return the table and the heat map of the scores of a prediction."""
    return output.with_name(f"{output.stem}-scores.csv"), output.with_name(f"{output.stem}-scores.png")


def _challenge_file(cfg: DictConfig) -> Path:
    """Return the table of the challenge's score over all predictions."""
    out = Path(OmegaConf.select(cfg, "folder") or cfg.writer.output)
    return out.with_name(f"{out.stem}-challenge.csv")


def _scores(cfg: DictConfig, writer: Any, classes: Sequence[str]) -> str:
    """Compare a prediction with annotated crops; return the scores as text, or the reason why there are none."""
    truth = truth_folders(cfg)
    if truth is None:
        return f"no scores: {_REMOTE}"
    unknown = OmegaConf.to_container(cfg.data).get("unknown", "metadata")  # type: ignore[union-attr]
    trained = _trained(cfg.get("ckpt"))
    scores = evaluate(writer.output, truth, classes, writer.threshold, unknown, trained=trained)
    table_file, matrix = _score_files(writer.output)
    write_csv(scores, table_file)
    draw(scores, matrix)
    folders = list(dict.fromkeys(score.folder for score in scores if score.folder is not None))
    notes = "".join(f"\n{note}" for note in matching_notes(trained, folders))
    return f"{table(scores)}{notes}\n\n{table_file}\n{matrix}\n{_NOT_CSC}"


def _is_local(cfg: DictConfig) -> bool:
    """Return True if the raw volume is on this machine."""
    data: Any = OmegaConf.to_container(cfg.data, resolve=True)
    return isinstance(parse_location(str(cfg.input_path), data.get("storage_options")), Path)


def _trained(checkpoint: Any) -> dict[Path, list[CropPart]] | None:
    """Return the parts of crops that the run of a checkpoint used; None where its folder lists no crops."""
    folder = run_folder(checkpoint)
    return None if folder is None else trained_crops(folder)


@contextmanager
def _errors_only() -> Iterator[None]:
    """Silence the package's log below errors: each crop and class would be announced as in a training."""
    package = logging.getLogger("cellmap_lightning")
    level = package.level
    package.setLevel(logging.ERROR)
    try:
        yield
    finally:
        package.setLevel(level)


def _picture(cfg: DictConfig, writer: Any, classes: Sequence[str]) -> str:
    """Draw a prediction; return the path of the picture, or the reason why it is missing."""
    if not _is_local(cfg):
        return f"no picture: {_REMOTE}"
    picture: Path = writer.output.with_name(f"{writer.output.stem}.png")
    replaced: Any = OmegaConf.to_container(cfg.metadata, resolve=True)
    # The picture shows raw as it is stored.
    metadata = {key: value for key, value in replaced.items() if key not in ("normalize", "invert")}
    metadata["level_translations"] = cfg.data.get("level_translations", "auto")
    # Outside of the layout of the challenge the crops of a volume are known from the training alone.
    run = run_folder(cfg.get("ckpt"))
    entries = [] if run is None else run_crops(run, Path(str(cfg.input_path)))
    known = writer.classes or cfg.data.classes or writer.names
    try:
        draw_prediction(
            writer.output, str(cfg.input_path), classes, picture, _shown_crops(cfg), writer.threshold, metadata, known,
            _trained(cfg.get("ckpt")), entries,
        )  # fmt: skip
    except (ChunkError, MissingExtraError) as e:  # the prediction itself is finished
        return f"no picture: {e}"
    return str(picture)


def _shown_crops(cfg: DictConfig) -> list[Path]:
    """Return the folders of crops that a picture shows, beside those of the training; some may not exist."""
    if OmegaConf.select(cfg, "truth") is not None:
        return truth_folders(cfg) or []
    return [Path(str(groundtruth(str(cfg.input_path))))]


def csc_scores(configs: Sequence[DictConfig]) -> str:
    """Return the challenge's score over the crops of all predictions, as a table, and write it beside them.

    Raises:
        CellMapError: no crop can be compared, or something cannot be read.
    """
    predictions: list[Predicted] = []
    for cfg in configs:
        names = OmegaConf.select(cfg, "listed") or cfg.writer.only or cfg.writer.classes or cfg.data.classes
        crop = OmegaConf.select(cfg, "crop")
        truth = truth_folders(cfg)
        if truth is None:
            return f"no scores: {cfg.input_path}: {_REMOTE}"
        predictions += [Predicted(Path(cfg.writer.output), folder, tuple(names), crop) for folder in truth]
    data: Any = OmegaConf.to_container(configs[0].data, resolve=True)
    scoring = Scoring(configs[0].writer.threshold, unknown=data.get("unknown", "metadata"))
    trained = _trained(configs[0].get("ckpt"))
    score = evaluate_csc(predictions, scoring, trained)
    folders = list(dict.fromkeys(row.folder for row in score.crops if row.folder is not None))
    notes = "".join(f"\n{note}" for note in matching_notes(trained, folders))
    file = _challenge_file(configs[0])
    write_csc_csv(score, file)
    return f"{csc_table(score)}{notes}\n\n{file}"
