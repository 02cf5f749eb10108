"""The choice of a few combinations of parameters that cover what many of them test."""

from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import combinations


def cover(rows: Sequence[Sequence[Hashable]], size: int) -> list[int]:
    """Choose rows until each combination of ``size`` values that some row has is in a chosen one.

    Each next row is the one with the most combinations that are not covered yet; of several, the one whose values are
    the least chosen, and of these the first. What is chosen thus depends on nothing but the rows and their order.

    Args:
        rows: values of the parameters, in the same order in each row.
        size: 1 for each value of each parameter, 2 for each pair of values of two parameters, and so on.

    Returns:
        The numbers of the chosen rows, in ascending order.
    """
    parts = [set(combinations(enumerate(row), min(size, len(row)))) for row in rows]
    missing = set().union(*parts)
    used: Counter[tuple[int, Hashable]] = Counter()
    chosen = []
    while missing:
        best = min(
            range(len(rows)),
            key=lambda n: (-len(parts[n] & missing), sum(used[value] for value in enumerate(rows[n])), n),
        )
        missing -= parts[best]
        used.update(enumerate(rows[best]))
        chosen.append(best)
    return sorted(chosen)
