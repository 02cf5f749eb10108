"""Command lines: values that Hydra's grammar would refuse, and errors before Hydra reads anything."""

import argparse
import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from cellmap_lightning.errors import CellMapKeyError, CellMapTypeError, CellMapValueError
from cellmap_lightning.redaction import hide_overrides

#: Keys whose values are paths, which are quoted where the grammar would refuse them: ``epoch=0-step=3.ckpt``.
PATHS = ("ckpt", "resume", "init_from")
#: Groups without which a command runs too.
_OPTIONAL = ("callbacks", "logger", "experiment")
#: The key that is meant by a path alone, by command and ending.
_MEANT = {
    "train": {".ckpt": "resume={0} or init_from={0}", ".csv": "data.csv_path={0}"},
    "predict": {".ckpt": "ckpt={0}", ".zarr": "data.input_path={0}"},
    "inspect": {".csv": "data.csv_path={0}", ".zarr": "data.input_path={0}"},
    "preview": {".csv": "data.csv_path={0}"},
    "submit": {".csv": "manifest={0}", ".zarr": "out={0}"},
}


def prepared(name: str, arguments: list[str], configs: Path) -> list[str]:
    """Return a command line that Hydra reads as it is meant.

    Args:
        name: the command, such as ``train``.
        arguments: its arguments.
        configs: the folder of the configurations that come with the package.

    Raises:
        CellMapValueError: an argument that is no ``key=value``, or a value that needs quotes.
        CellMapKeyError: a group is removed that the command needs.
        CellMapTypeError: an experiment sets a group to the name of one of its options.
    """
    with contextlib.redirect_stderr(io.StringIO()):  # Hydra reports what it does not know itself
        try:
            known, unknown = get_args_parser().parse_known_args(arguments)
        except SystemExit:
            return arguments
    if known.shell_completion or any(argument.startswith("-") for argument in unknown):
        return arguments
    given = [*known.overrides, *unknown]
    _check_blanks(given)
    for argument in given:
        _check_argument(name, argument, configs)
    several = bool(known.multirun)
    quoted = {argument: _quoted(argument, several) for argument in given}
    for argument in quoted.values():
        _check_grammar(argument)
    _check_files(known, given, configs)
    return [quoted.get(argument, argument) for argument in arguments]


def _read(argument: str) -> str | None:
    """Return what the grammar reports about an override; None if it can be read."""
    try:
        OverridesParser.create().parse_overrides([argument])
    except HydraException as e:
        return next((line for line in str(e).splitlines() if not line.startswith("Error parsing")), "")
    return None


def _quoted(argument: str, several: bool) -> str:
    """Return an override with its path in quotes, if it needs them; with ``-m``, each of several paths."""
    match = re.fullmatch(rf"(\+{{0,2}}(?:{'|'.join(PATHS)})=)([^'\"\[{{].*)", argument)
    if match is None or _read(argument) is None:
        return argument
    paths = match[2].split(",") if several else [match[2]]
    return match[1] + ",".join("'" + path.replace("\\", "\\\\").replace("'", "\\'") + "'" for path in paths)


def _check_blanks(given: list[str]) -> None:
    """Check for values that a shell has divided at blanks."""
    for number, argument in enumerate(given):
        following = [*given[number + 1 :], "", ""]
        value = argument.partition("=")[2]
        if any(value.count(left) > value.count(right) for left, right in ("[]", "{}")):
            for end in range(number + 2, len(given) + 1):
                whole = " ".join(given[number:end])
                if _read(argument) is not None and _read(whole) is None:
                    text = hide_overrides(whole)
                    raise CellMapValueError(
                        f"{text}: the shell divides it at its blanks; write {''.join(text.split())}, or put it in "
                        f"quotes: '{text}'"
                    )
        before = "=" not in argument and following[0].startswith("=")
        after = argument.endswith("=") and following[0] and "=" not in following[0] and following[0][0] != "~"
        if before or after:
            text = f"{argument}{following[0]}{following[1] if following[0] == '=' else ''}"
            raise CellMapValueError(
                f"{argument.rstrip('=')}: blanks around '=' divide it; write {hide_overrides(text)} without them"
            )


def _check_argument(name: str, argument: str, configs: Path) -> None:
    groups = {path.name: [p.stem for p in sorted(path.glob("*.yaml"))] for path in configs.iterdir() if path.is_dir()}
    if argument.startswith("~"):
        group = argument[1:].partition("=")[0]
        if group in groups and group not in _OPTIONAL:
            raise CellMapKeyError(
                f"{argument}: cellmap-{name} needs {group}; choose another with {group}=..., one of "
                f"{', '.join(groups[group])}"
            )
        return
    path = argument.rstrip("/")
    ending = ".zarr" if ".zarr/" in argument else Path(path).suffix
    meant = _MEANT.get(name, {}).get(ending)
    key = argument.partition("=")[0]
    is_path = meant is not None and (key == "epoch" or ("/" in key and not key.startswith("hydra/")))
    if not argument or ("=" in argument and not is_path):
        return
    group = next((g for g in ("experiment", *sorted(groups)) if argument in groups.get(g, ())), "")
    if meant is not None:
        hint = f"did you mean {meant.format(argument)}?"
    elif ending in (".yaml", ".yml"):
        hint = f"a file in my_configs/experiment is chosen by --config-dir my_configs experiment={Path(path).stem}"
    elif group:
        hint = f"did you mean {group}={argument}?"
    else:
        hint = f"'cellmap-{name} --cfg job' prints every key"
    raise CellMapValueError(f"{argument}: arguments have the form key=value; {hint}")


def _check_grammar(argument: str) -> None:
    fault = _read(argument)
    if fault is not None:
        key, _, value = argument.partition("=")
        text, advice = hide_overrides(argument), hide_overrides(f"{key}='{value}'")
        raise CellMapValueError(
            f"{text} cannot be read ({hide_overrides(fault)}); a value with characters that have a meaning, such as "
            f'=, (, [ or {{, needs quotes inside those of the shell: "{advice}"'
        )


def _check_files(known: argparse.Namespace, given: list[str], configs: Path) -> None:
    """Check the user's files that the command line chooses, and those that they include, before Hydra merges them."""
    if not known.config_dir:
        return
    left = [
        f"{group}/{option}"
        for group, _, options in (argument.lstrip("+").partition("=") for argument in given)
        for option in options.split(",")
    ]
    checked = set()
    while left:
        name = left.pop().lstrip("/").removesuffix(".yaml")
        file = Path(known.config_dir) / f"{name}.yaml"
        if name in checked or not re.fullmatch(r"[\w/.-]+", name) or not file.is_file():
            continue
        checked.add(name)
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except yaml.YAMLError as e:
            raise CellMapValueError(_yaml_fault(e, file)) from e
        if isinstance(content, dict):
            group = name.rpartition("/")[0]
            if group == "experiment":
                check_groups(content, configs, str(file))
            left += _included(content.get("defaults"), group)


def _included(defaults: Any, group: str) -> Iterator[str]:
    """Yield the names of the files that a defaults list includes."""
    for entry in defaults if isinstance(defaults, list) else ():
        for key, options in entry.items() if isinstance(entry, dict) else (("", entry),):
            folder = str(key).removeprefix("override ").removeprefix("optional ").partition("@")[0]
            folder = folder if folder.startswith("/") else f"{group}/{folder}".rstrip("/")
            for option in options if isinstance(options, list) else (options,):
                if isinstance(option, str):
                    yield option if option.startswith("/") else f"{folder}/{option}"


def _yaml_fault(error: yaml.YAMLError, file: Path) -> str:
    """Return a sentence on a file that is no YAML."""
    mark = getattr(error, "problem_mark", None)
    problem = str(getattr(error, "problem", None) or error)
    if "'\\t'" in problem:
        problem = "it is indented with a tab; use blanks, two for each level"
    elif "mapping values are not allowed" in problem:
        problem = "a value that contains ': ' needs quotes"
    return f"{file}{f', line {mark.line + 1}' if mark is not None else ''}: {problem}"


def check_groups(content: dict[Any, Any], configs: Path, where: str = "the configuration") -> None:
    """Check that a configuration sets no group to a text.

    Args:
        content: the configuration, as plain containers.
        configs: the folder with a folder for each group.
        where: its file, for messages.

    Raises:
        CellMapTypeError: it does; the message shows how an option is chosen.
    """
    for group in sorted(path.name for path in configs.iterdir() if path.is_dir()):
        value = content.get(group)
        if isinstance(value, str) and group != "experiment" and "${" not in value:
            raise CellMapTypeError(
                f"{where}: '{group}: {value}' replaces all of {group} by a text; an option of a group is chosen with "
                f"{group}={value} on the command line, or in the file below its first line with\n"
                f"defaults:\n  - override /{group}: {value}"
            )
