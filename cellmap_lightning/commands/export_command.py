"""The command ``cellmap-export``."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cellmap_lightning.commands.program import run_command


def main() -> Any:
    """Run ``cellmap-export``: write the model of a checkpoint for other programs."""
    return run_command("export", lambda configs: _export(configs[0]))


def _export(cfg: DictConfig) -> None:
    from cellmap_lightning.export.bioimageio import PackageOptions
    from cellmap_lightning.export.staging import check_output
    from cellmap_lightning.export.targets import TARGETS, export_model
    from cellmap_lightning.export.trained_model import restore_model
    from cellmap_lightning.validation import one_of

    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    one_of("to", settings["to"], TARGETS)
    out, overwrite = Path(settings["out"]), bool(settings["overwrite"])
    package = PackageOptions(**settings["package"])
    check_output(out, overwrite)  # before the checkpoint is read
    model = restore_model(
        Path(settings["ckpt"]), settings["trust"], settings["trust_checkpoint"], settings["stored_dtype"]
    )
    card = export_model(model, settings["to"], out, overwrite, package)
    verified = card.about["verified"]
    halo = list(card.halo or ())
    print(
        f"{out}: {card.about['network']}, {card.about['parameters']:,} parameters, halo {halo} voxels\n"
        f"the output differs from that of the checkpoint by {verified['max_difference']:.2g}; other shapes of the "
        f"input: {'compared' if verified['other_shape'] else 'not possible'}"
    )
