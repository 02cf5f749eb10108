"""The command ``cellmap-segment``."""

from dataclasses import fields
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cellmap_lightning.commands.config_keys import given_keys
from cellmap_lightning.commands.program import run_command
from cellmap_lightning.flat_options import from_flat
from cellmap_lightning.wording import plural


def main() -> Any:
    """Run ``cellmap-segment``: number the objects of a prediction."""
    return run_command("segment", _segment)


def _segment(configs: list[DictConfig]) -> None:
    from cellmap_lightning.commands.segment import segment
    from cellmap_lightning.instances.options import SourceOptions
    from cellmap_lightning.instances.tuned import OPTION_KEYS
    from cellmap_lightning.runtime.scheduling import SchedulerOptions

    settings: Any = OmegaConf.to_container(configs[0], resolve=True)
    if settings["tuned"] is not None:  # defaults of the configuration do not replace parameters of the file
        for key in set(OPTION_KEYS) - given_keys():
            del settings[key]
    groups = {"source": SourceOptions, "scheduling": SchedulerOptions}
    grouped: dict[str, Any] = {name: from_flat(kind, settings) for name, kind in groups.items()}
    flat = {field.name for kind in groups.values() for field in fields(kind)}
    rest = {key: value for key, value in settings.items() if key not in flat}
    summary = segment(class_name=rest.pop("class"), **grouped, **rest)
    print(f"\n{summary.labels}: {plural(summary.objects, 'object')}\n{summary.table}")
    if summary.picture is not None:
        print(summary.picture)
