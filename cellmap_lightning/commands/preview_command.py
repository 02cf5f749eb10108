"""The command ``cellmap-preview``."""

from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from cellmap_lightning.commands.messages import quieten
from cellmap_lightning.commands.program import run_command
from cellmap_lightning.errors import CellMapKeyError, CellMapValueError
from cellmap_lightning.validation import one_of


def main() -> Any:
    """Run ``cellmap-preview``: draw batches exactly as a training step receives them."""
    return run_command("preview", _preview)


def _preview(configs: list[DictConfig]) -> None:
    from cellmap_lightning.visualization.preview import collect, write

    quieten()
    (cfg,) = configs
    one_of("split", cfg.split, ("train", "val", "test"), CellMapKeyError)
    out = Path(cfg.out)
    if out.suffix not in (".png", ".pdf", ".svg"):
        raise CellMapValueError(
            f"out must be a .png, .pdf or .svg file, got {cfg.out!r}; html=true writes a page beside it"
        )
    with instantiate(cfg.data, _convert_="all") as data:
        previews = collect(getattr(data, f"{cfg.split}_dataloader")(), cfg.samples, cfg.epoch, cfg.serve)
        title = f"{cfg.split}, epoch {cfg.epoch}, seed {cfg.seed}"
        files = write(previews, data.classes or (), out, title, cfg.overlay, cfg.html)
    print("\n\n".join(f"{p.sample.header}\n  {p.napari}\n  {p.neuroglancer}" for p in previews))
    print("\n" + "\n".join(map(str, files)))
