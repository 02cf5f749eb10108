"""Configurations of predictions with exported models."""

import hashlib
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.export.exported_task import INPUT
from cellmap_lightning.export.model_card import CARD, WEIGHTS, ModelCard, read_card


def is_exported(ckpt: Any) -> bool:
    """Return True for the description of an exported model, or the folder with it.

    Raises:
        CellMapValueError: it is the weights of one, which do not say what the input is.
    """
    path = Path(str(ckpt))
    if path.suffix in WEIGHTS:
        raise CellMapValueError(
            f"ckpt={path} holds weights alone; give the {CARD} of its export, or a YAML file as in docs/export.md"
        )
    return path.suffix in (".json", ".yaml", ".yml") or (path / CARD).is_file()


def exported_config(cfg: DictConfig, writer: dict[str, Any]) -> DictConfig:
    """Return the configuration of a prediction with an exported model: that of the command line and its description.

    Args:
        cfg: ``predict.yaml`` with all overrides, whose ``ckpt`` is a description; see `ModelCard`.
        writer: the arguments of the writer; the activation and the identity of the model are added to it.

    Raises:
        CellMapError: the description is invalid, or does not say how stored values become the input.
    """
    card = read_card(Path(cfg.ckpt), "ckpt")
    replaced: Any = OmegaConf.to_container(cfg.metadata, resolve=True)
    metadata = {key: value for key, value in replaced.items() if value is not None}
    if card.normalize is None and "normalize" not in metadata:
        raise CellMapValueError(
            f"ckpt={cfg.ckpt}: normalize is null, as its training had several rules; give metadata.normalize=..."
        )
    patch = _exported_patch(card, cfg)
    described = {
        "classes": list(card.classes),
        "input_arrays": {INPUT: {"shape": patch["shape"], "scale": patch["scale"]}},
        "target_arrays": {"output": {"shape": patch["output_shape"], "scale": patch["output_scale"]}},
        "normalize": card.normalize or "dtype",
        "invert": card.invert,
        "datasets": {"predict": [{"raw": cfg.data.input_path, **metadata}]},
        "csv_path": None,
        "split": "csv",
    }
    # Only what the description leaves open is read: other defaults refer to values that are not given.
    data = {key: _plain(cfg.data[key]) for key in cfg.data if key not in (*described, "input_path")}
    writer["activation"] = writer["activation"] or card.activation
    weights = (Path(cfg.ckpt) if Path(cfg.ckpt).is_dir() else Path(cfg.ckpt).parent) / card.weights
    writer["model_id"] = writer["model_id"] or f"{weights.name} {hashlib.sha256(weights.read_bytes()).hexdigest()[:16]}"
    return OmegaConf.create(
        {
            "ckpt": None, "patch": {name: patch[name] for name in ("shape", "scale")}, "data": data | described,
            "task": {"_target_": "cellmap_lightning.export.exported_task.ExportedTask", "path": str(cfg.ckpt)},
            "trainer": OmegaConf.to_container(cfg.trainer, resolve=True), "writer": writer,
            "evaluate": bool(cfg.evaluate), "metric": cfg.metric, "picture": bool(cfg.picture),
            "input_path": cfg.data.input_path, "metadata": metadata,
        }
    )  # fmt: skip


def _plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def _exported_patch(card: ModelCard, cfg: DictConfig) -> dict[str, list[Any]]:
    """Return shapes and voxel sizes of input and output; a larger patch of the command line enlarges both."""
    overrides: Any = OmegaConf.to_container(cfg.patch)
    shape, scale = overrides["shape"] or card.input_shape, overrides["scale"] or card.input_voxel_size
    if len(shape) != len(card.input_shape) or len(scale) != len(card.input_shape):
        raise CellMapValueError(
            f"patch.shape={list(shape)} and patch.scale={list(scale)} must have {len(card.input_shape)} numbers, as "
            f"the input of {cfg.ckpt}"
        )
    zooms = [s / o for s, o in zip(card.input_voxel_size, card.output_voxel_size, strict=True)]
    added = [(n - m) * zoom for n, m, zoom in zip(shape, card.input_shape, zooms, strict=True)]
    output = [m + a for m, a in zip(card.output_shape, added, strict=True)]
    if any(n < 1 or n != int(n) for n in output):
        raise CellMapValueError(
            f"patch.shape={list(shape)}: its output would have {output} voxels; {cfg.ckpt} has "
            f"{list(card.input_shape)} and {list(card.output_shape)}"
        )
    return {
        "shape": list(shape),
        "scale": [float(s) for s in scale],
        "output_shape": [int(n) for n in output],
        "output_scale": [float(s / zoom) for s, zoom in zip(scale, zooms, strict=True)],
    }
