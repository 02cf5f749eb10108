"""The texts of ``--help`` and ``--version``."""

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from cellmap_lightning import __version__

#: The text of ``--help``; the header ends with a line break.
_TEMPLATE = """{header}
{groups}Options:
  key=value                set a value, such as seed=1
  --cfg job                print every key and its value, and exit; docs/configuration.md describes them
  -m key=1,2,3             run once per value; -m comes first
  --config-dir my_configs  read your files too, such as my_configs/experiment/mito.yaml
  --version                print the version, and exit
  --hydra-help             print the other options, which are those of Hydra"""


def register_help() -> None:
    """Register ``${command_help:header,choices,sources}``, the template of ``hydra.help``, with OmegaConf."""
    OmegaConf.register_new_resolver("command_help", command_help, replace=True)


def version_text() -> str:
    """Return the text that ``--version`` prints."""
    return f"cellmap-lightning {__version__}"


def command_help(header: str, choices: Any, sources: Any) -> str:
    """Return the help of a command.

    Args:
        header: a sentence about the command, and examples.
        choices: the selected option of each group that the command composes (``hydra.runtime.choices``).
        sources: the folders of configurations (``hydra.runtime.config_sources``).
    """
    folders = [Path(source["path"]) for source in sources if source["schema"] == "file"]
    lines = [
        textwrap.fill(f"  {group}: {', '.join(options)}", 100, subsequent_indent="    ")
        for group in sorted(choices)
        if (options := sorted(set(_options(group, folders))))
    ]
    groups = "\n".join(["Groups, with their options (group=option):", *lines, "", ""]) if lines else ""
    # Hydra substitutes names after a dollar sign.
    return _TEMPLATE.format(header=header, groups=groups).replace("$", "$$")


def _options(group: str, folders: list[Path]) -> Iterator[str]:
    """Yield the names of the files of a group."""
    for folder in folders:
        yield from (path.stem for path in (folder / group).glob("*.yaml"))
