"""The command ``cellmap-preview``."""

import shutil
import textwrap
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from cellmap_lightning.commands.config_keys import training_data
from cellmap_lightning.commands.messages import quieten
from cellmap_lightning.commands.program import run_command
from cellmap_lightning.errors import CellMapKeyError, CellMapValueError
from cellmap_lightning.io.own_files import check_replaceable
from cellmap_lightning.validation import first_few, one_of

#: Samples that are read for each one that is drawn.
_CANDIDATES = 4
#: Legend of the unknown voxels of tiles, each voxel of a crop being scored once.
_TILED = "scored in another tile, or unknown for every class"
#: Crops without a sample that are listed.
_LISTED = 8


def main() -> Any:
    """Run ``cellmap-preview``: draw batches exactly as a training step receives them."""
    return run_command("preview", _preview, lambda cfg: [training_data(cfg)])


def _candidates(samples: Any) -> int | None:
    """Return the number of samples to choose from; None for a number that `collect` refuses."""
    return _CANDIDATES * samples if isinstance(samples, int) else None


def _preview(configs: list[DictConfig]) -> None:
    from cellmap_lightning.visualization.figures.legend import UNKNOWN_TEXT
    from cellmap_lightning.visualization.preview import collect, write

    quieten()
    (cfg,) = configs
    one_of("split", cfg.split, ("train", "val", "test"), CellMapKeyError)
    out = Path(cfg.out)
    if out.suffix not in (".png", ".pdf", ".svg"):
        raise CellMapValueError(
            f"out must be a .png, .pdf or .svg file, got {cfg.out!r}; html=true writes a page beside it"
        )
    links = out.with_name(f"{out.stem}-links.txt")
    pages = [out.with_suffix(".html")] if cfg.html else []
    check_replaceable([out, *pages, links], f"out={out}", "choose another out=..., or move that file")
    with instantiate(cfg.data, _convert_="all") as data:
        loader = getattr(data, f"{cfg.split}_dataloader")()
        previews = collect(loader, cfg.samples, cfg.epoch, cfg.serve, _candidates(cfg.samples))
        title = f"{cfg.split}, epoch {cfg.epoch}, seed {cfg.seed}"
        absent = [crop.label for crop in loader.source.crops if crop.label not in {one.crop for one in previews}]
        unknown = UNKNOWN_TEXT if cfg.split == "train" else _TILED
        files = write(previews, data.classes or (), out, title, cfg.overlay, cfg.html, unknown)
    links.write_text("\n\n".join(f"{p.sample.header}\n{p.napari}\n{p.neuroglancer}" for p in previews) + "\n")
    width = shutil.get_terminal_size().columns
    for preview in previews:
        print("\n".join(textwrap.wrap(preview.sample.header, width, subsequent_indent="    ")))
    if absent:
        text = (
            f"not shown, as no sample that was read is of them: {first_few(absent, _LISTED)}; "
            f"data.only_crops=[{','.join(absent[:_LISTED])}] data.unannotated_classes=unknown shows "
            "them alone"
        )
        print("\n" + "\n".join(textwrap.wrap(text, width, subsequent_indent="    ")))
    print("\n" + "\n".join(map(str, (*files, links))))
