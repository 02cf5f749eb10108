"""Command lines: quotes for values that Hydra's grammar refuses, and errors with the right form before Hydra runs."""

import argparse
import contextlib
import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from cellmap_lightning.errors import CellMapKeyError, CellMapTypeError, CellMapValueError
from cellmap_lightning.redaction import hide_overrides

#: Keys whose values are paths, which are quoted if the grammar refuses them: ``epoch=0-step=3.ckpt``.
PATHS = ("ckpt", "resume", "init_from")
#: Groups that a command does not need.
_OPTIONAL = ("augment", "callbacks", "logger", "experiment")
#: The keys for a path without a key, by command and suffix.
_KEYS_OF_PATHS = {
    "train": {".ckpt": "resume={0} or init_from={0}", ".csv": "data.csv_path={0}"},
    "predict": {".ckpt": "ckpt={0}", ".zarr": "data.input_path={0}"},
    "export": {".ckpt": "ckpt={0}"},
    "inspect": {".csv": "data.csv_path={0}", ".zarr": "data.input_path={0}"},
    "preview": {".csv": "data.csv_path={0}"},
    "convert": {".tif": "input={0}", ".h5": "input={0}/<dataset>", ".zarr": "output={0}"},
    "segment": {".zarr": "input={0}"},
    "submit": {".csv": "manifest={0}", ".zarr": "out={0}"},
}


def prepare_arguments(name: str, arguments: list[str], configs: Path) -> list[str]:
    """Return a command line with the quotes that Hydra's grammar needs.

    Args:
        name: the command, such as ``train``.
        arguments: its arguments.
        configs: the folder of the package's configurations.

    Raises:
        CellMapValueError: an argument does not have the form ``key=value``, or a value needs quotes.
        CellMapKeyError: a group that the command needs is removed.
        CellMapTypeError: an experiment sets a group to the name of one of its options.
    """
    with contextlib.redirect_stderr(io.StringIO()):  # Hydra reports unknown options itself
        try:
            known, unknown = get_args_parser().parse_known_args(arguments)
        except SystemExit:
            return arguments
    if known.shell_completion or any(argument.startswith("-") for argument in unknown):
        return arguments
    overrides = [*known.overrides, *unknown]
    _check_blanks(overrides)
    for argument in overrides:
        _check_argument(name, argument, configs)
    quoted = {argument: _quoted(argument, bool(known.multirun)) for argument in overrides}
    for argument in quoted.values():
        _check_grammar(argument)
    _check_files(known, overrides, configs)
    return [quoted.get(argument, argument) for argument in arguments]


def _grammar_error(argument: str) -> str | None:
    """Return the grammar's error about an override; None if it can be read."""
    try:
        OverridesParser.create().parse_overrides([argument])
    except HydraException as e:
        return next((line for line in str(e).splitlines() if not line.startswith("Error parsing")), "")
    return None


def _quoted(argument: str, multirun: bool) -> str:
    """Return an override with its path in quotes, if it needs them; in a sweep, each of several paths."""
    match = re.fullmatch(rf"(\+{{0,2}}(?:{'|'.join(PATHS)})=)([^'\"\[{{].*)", argument)
    if match is None or _grammar_error(argument) is None:
        return argument
    paths = match[2].split(",") if multirun else [match[2]]
    return match[1] + ",".join("'" + path.replace("\\", "\\\\").replace("'", "\\'") + "'" for path in paths)


def _check_blanks(overrides: list[str]) -> None:
    """Check for values that a shell has split at blanks."""
    for number, argument in enumerate(overrides):
        following = [*overrides[number + 1 :], "", ""]
        value = argument.partition("=")[2]
        if any(value.count(left) > value.count(right) for left, right in ("[]", "{}")):
            # Unbalanced brackets: the value is split if it can be read together with some of the following arguments.
            for end in range(number + 2, len(overrides) + 1):
                whole = " ".join(overrides[number:end])
                if _grammar_error(argument) is not None and _grammar_error(whole) is None:
                    text = hide_overrides(whole)
                    raise CellMapValueError(
                        f"{text}: the shell splits it at its blanks; write {''.join(text.split())}, or put it in "
                        f"quotes: '{text}'"
                    )
        # "key =value" and "key = value", or "key= value".
        before = "=" not in argument and following[0].startswith("=")
        after = argument.endswith("=") and following[0] and "=" not in following[0] and following[0][0] != "~"
        if before or after:
            text = f"{argument}{following[0]}{following[1] if following[0] == '=' else ''}"
            raise CellMapValueError(
                f"{argument.rstrip('=')}: blanks around '=' split it; write {hide_overrides(text)} without them"
            )


def _check_argument(name: str, argument: str, configs: Path) -> None:
    """Check that an argument has the form ``key=value``, or removes a group that the command does not need."""
    groups = {path.name: [p.stem for p in sorted(path.glob("*.yaml"))] for path in configs.iterdir() if path.is_dir()}
    _check_removal(name, argument, groups)
    if argument.startswith("~"):
        return
    path = argument.rstrip("/")
    suffix = ".zarr" if ".zarr/" in argument else Path(path).suffix
    suggestion = _KEYS_OF_PATHS.get(name, {}).get(suffix)
    key = argument.partition("=")[0]
    # A path may contain "=" itself: epoch=0-step=3.ckpt, or runs/epoch=0.ckpt.
    is_path = suggestion is not None and (key == "epoch" or ("/" in key and not key.startswith("hydra/")))
    if not argument or ("=" in argument and not is_path):
        return
    group = next((g for g in ("experiment", *sorted(groups)) if argument in groups.get(g, ())), "")
    if suggestion is not None:
        hint = f"did you mean {suggestion.format(argument)}?"
    elif suffix in (".yaml", ".yml"):
        hint = f"a file in my_configs/experiment is selected by --config-dir my_configs experiment={Path(path).stem}"
    elif group:
        hint = f"did you mean {group}={argument}?"
    else:
        hint = f"'cellmap-{name} --cfg job' prints every key"
    raise CellMapValueError(f"{argument}: arguments have the form key=value; {hint}")


def _check_removal(name: str, argument: str, groups: Mapping[str, list[str]]) -> None:
    """Check that an argument such as ``~model`` or ``model=null`` does not remove a group that the command needs."""
    key, _, value = argument.lstrip("+~").partition("=")
    if key not in groups or not (argument.startswith("~") or value == "null"):
        return
    if key not in _OPTIONAL:
        own = f"my_configs/{key}/mine.yaml is selected by --config-dir my_configs {key}=mine"
        raise CellMapKeyError(
            f"{argument}: cellmap-{name} needs {key}; select another with {key}=..., one of {', '.join(groups[key])}; "
            f"{own}"
        )
    if value == "null" and not argument.startswith("~"):  # Hydra takes it for the name of an option
        raise CellMapValueError(f"{argument}: a group is left out with ~{key}")


def _check_grammar(argument: str) -> None:
    """Check that Hydra's grammar can read an override."""
    error = _grammar_error(argument)
    if error is not None:
        key, _, value = argument.partition("=")
        text, advice = hide_overrides(argument), hide_overrides(f"{key}='{value}'")
        raise CellMapValueError(
            f"{text} cannot be read ({hide_overrides(error)}); a value with special characters, such as "
            f'=, (, [ or {{, needs quotes inside those of the shell: "{advice}"'
        )


def _check_files(known: argparse.Namespace, overrides: list[str], configs: Path) -> None:
    """Check the user's files that the command line selects, and those that they include, before Hydra merges them."""
    if not known.config_dir:
        return
    queue = [
        f"{group}/{option}"
        for group, _, options in (argument.lstrip("+").partition("=") for argument in overrides)
        for option in options.split(",")
    ]
    checked = set()  # files may include each other
    while queue:
        name = queue.pop().lstrip("/").removesuffix(".yaml")
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
            queue += _included(content.get("defaults"), group)


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
    """Return a message about a file that is not valid YAML."""
    mark = getattr(error, "problem_mark", None)
    problem = str(getattr(error, "problem", None) or error)
    if "'\\t'" in problem:
        problem = "indented with a tab; use blanks, two for each level"
    elif "mapping values are not allowed" in problem:
        problem = "a value that contains ': ' needs quotes"
    return f"{file}{f', line {mark.line + 1}' if mark is not None else ''}: {problem}"


def check_groups(content: dict[Any, Any], configs: Path, where: str = "the configuration") -> None:
    """Check that a configuration does not replace a group by a text.

    Args:
        content: the configuration, as plain containers.
        configs: the folder with a folder for each group.
        where: its file, for messages.

    Raises:
        CellMapTypeError: it does; the message shows how to select an option.
    """
    for group in sorted(path.name for path in configs.iterdir() if path.is_dir()):
        value = content.get(group)
        if isinstance(value, str) and group != "experiment" and "${" not in value:
            raise CellMapTypeError(
                f"{where}: '{group}: {value}' replaces all of {group} by a text; an option of a group is selected with "
                f"{group}={value} on the command line, or in the file below its first line with\n"
                f"defaults:\n  - override /{group}: {value}"
            )
