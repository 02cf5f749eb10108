"""The combinations of parameters that plain `pytest` runs of a test that is marked with ``cover``."""

from itertools import combinations, product

import pytest

from tests.cover import cover


def parts(rows, size):
    return set().union(*(combinations(enumerate(row), size) for row in rows))


@pytest.mark.parametrize(
    ("counts", "size", "chosen"),
    [
        ((6, 3), 1, 6),
        ((6, 3), 2, 18),
        ((3, 6, 3), 1, 6),
        ((6, 3, 3), 2, 18),
        ((5,), 1, 5),
        ((5,), 2, 5),
        ((2, 2, 2, 2), 1, 2),
        ((2, 2, 2, 2), 4, 16),
        ((7, 2, 2), 2, 14),
    ],
    ids=str,
)
def test_a_few_combinations_have_all_of_many(counts, size, chosen):
    rows = list(product(*map(range, counts)))
    numbers = cover(rows, size)
    assert len(numbers) == chosen
    assert numbers == sorted(set(numbers))
    assert parts([rows[n] for n in numbers], min(size, len(counts))) == parts(rows, min(size, len(counts)))


def test_values_are_chosen_alike_often():
    rows = list(product(range(3), range(10)))
    firsts = [rows[n][0] for n in cover(rows, 1)]
    assert sorted(firsts.count(value) for value in range(3)) == [3, 3, 4]


def test_combinations_that_do_not_exist_are_not_asked_for():
    rows = [("a", 1), ("b", 2), ("b", 1), ("a", 1)]
    assert cover(rows, 1) == [0, 1]
    assert cover(rows, 2) == [0, 1, 2]
    assert cover([], 1) == []


@pytest.fixture(params=["x", "y"])
def fourth(request):
    return request.param


@pytest.mark.cover(1)
@pytest.mark.parametrize("first", ["a", "b", "c"])
@pytest.mark.parametrize(("second", "third"), [(1, 2), (3, 4), pytest.param(5, 6, marks=pytest.mark.slow)])
def test_each_value(first, second, third, fourth, request):
    family = [item for item in request.session.items if getattr(item, "originalname", "") == "test_each_value"]
    quick = [item.callspec.params for item in family if not item.get_closest_marker("slow")]
    if len({item.callspec.id for item in family}) < 3:
        pytest.skip("a part of the combinations was selected")
    if not request.node.get_closest_marker("slow"):
        assert len(quick) == 3
        assert {given["first"] for given in quick} == {"a", "b", "c"}
        assert {given["fourth"] for given in quick} == {"x", "y"}
        assert {(given["second"], given["third"]) for given in quick} == {(1, 2), (3, 4)}
