"""`cellmap_data.utils.misc`: small helpers that scripts import."""

import difflib
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch

from cellmap_lightning.crops.target_path import TargetPath
from cellmap_lightning.errors import CellMapValueError


def torch_max_value(dtype: torch.dtype) -> int:
    """The largest value of an integer type; 1 for all others."""
    return 1 if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool else torch.iinfo(dtype).max


def longest_common_substring(a: str, b: str) -> str:
    """The longest text that occurs in both."""
    found = difflib.SequenceMatcher(None, a, b, autojunk=False).find_longest_match()
    return a[found.a : found.a + found.size]


def split_target_path(path: str) -> tuple[str, list[str]]:
    """``.../[mito,er]`` as ``.../{label}`` and ``["mito", "er"]``; without a bracket, the path and its last name."""
    try:
        found = TargetPath.parse(path)
    except CellMapValueError:  # a bracket within a name, as in "crop[mito,er].zarr"
        before, _, rest = path.partition("[")
        inside, _, after = rest.partition("]")
        return f"{before}{{label}}{after}", inside.split(",")
    if "]" not in path.rstrip("/").rpartition("/")[2] and not found.after:
        return path, list(found.names)
    return "/".join(part for part in (found.before, "{label}", found.after) if part), list(found.names)


def is_array_2D(  # noqa: N802  the name that scripts know
    array_info: Mapping[str, Any] | None, summary: Callable[..., Any] | None = None
) -> Any:
    """Return True if a description has a shape of two numbers; of several, by name or as ``summary`` sums up."""
    return _asked(array_info, lambda shape: len(shape) == 2, summary)


def array_has_singleton_dim(array_info: Mapping[str, Any] | None, summary: bool = True) -> Any:
    """Return True if a description, or any of several, has an axis of length 1; by name with ``summary=False``."""
    return _asked(array_info, lambda shape: 1 in shape, any if summary else None)


def _asked(info: Mapping[str, Any] | None, question: Callable[[Any], bool], summary: Callable[..., Any] | None) -> Any:
    if not info:
        return False
    if "shape" in info:
        return question(info["shape"])
    answers = {name: _asked(value, question, summary) for name, value in info.items()}
    return answers if summary is None else summary(answers.values())


def get_sliced_shape(shape: Sequence[int], axis: int) -> list[int]:
    """A shape whose single slice is along an axis: its 1 is moved there, or one is put in."""
    found = list(shape)
    if 1 in found:
        found.remove(1)
    found.insert(axis, 1)
    return found


def expand_scale(scale: Sequence[float]) -> list[float]:
    """A scale of two numbers, with its first one doubled."""
    return [scale[0], *scale] if len(scale) == 2 else list(scale)


def permute_singleton_dimension(arr_dict: MutableMapping[str, Any], axis: int) -> None:
    """Make every description in a mapping one of slices along an axis, in place."""
    if "shape" in arr_dict and "scale" in arr_dict:
        arr_dict["shape"] = get_sliced_shape(arr_dict["shape"], axis)
        arr_dict["scale"] = expand_scale(arr_dict["scale"])
        return
    for value in arr_dict.values():
        permute_singleton_dimension(value, axis)


def min_redundant_inds(n: int, k: int, replacement: bool, rng: torch.Generator | None = None) -> torch.Tensor:
    """Numbers below ``n`` at random.

    Args:
        n: how many there are to choose from.
        k: how many are chosen.
        replacement: each by itself; otherwise each is there once before any is there twice.
        rng: generator; by default torch's global one.
    """
    device = "cpu" if rng is None else rng.device
    if replacement:
        return torch.randint(n, (k,), generator=rng, dtype=torch.int64, device=device)
    rounds = [torch.randperm(n, generator=rng, dtype=torch.int64, device=device) for _ in range(max(1, -(-k // n)))]
    return torch.cat(rounds)[:k]
