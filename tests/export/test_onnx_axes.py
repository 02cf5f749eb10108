"""Axes of free length in an ONNX file have the names of the field."""

import pytest

from cellmap_lightning.export.onnx import _name_axes

helper = pytest.importorskip("onnx.helper")


def graph(given, inner, returned):
    values = [
        helper.make_tensor_value_info(name, 1, shape)
        for name, shape in zip("abc", (given, inner, returned), strict=True)
    ]
    nodes = [helper.make_node("Relu", ["a"], ["b"]), helper.make_node("Relu", ["b"], ["c"])]
    return helper.make_graph(nodes, "network", [values[0]], [values[2]], value_info=[values[1]])


def shapes(graph):
    values = (*graph.input, *graph.value_info, *graph.output)
    return [[d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in values]


@pytest.mark.parametrize(
    ("given", "inner", "returned", "expected"),
    [
        (
            ["s77", 1, "s53", "s0", "s1"], ["s77", 8, "s53", "s0", "s1"], ["s77", 2, "s53", "s0", "s1"],
            [["batch", n, "z", "y", "x"] for n in (1, 8, 2)],
        ),
        (
            ["s77", 1, "s53", 16, 16], ["s77", 8, "((s53)//2)", 8, 8], ["s77", 2, "s53 - 2", 14, 14],
            [["batch", 1, "z", 16, 16], ["batch", 8, "((z)//2)", 8, 8], ["batch", 2, "z - 2", 14, 14]],
        ),
        (
            ["s1", 1, "s10", "s10"], ["s1", 8, "s10", "s10"], ["s1", 2, "s10", "u4"],
            [["batch", 1, "y", "y"], ["batch", 8, "y", "y"], ["batch", 2, "y", "u4"]],
        ),
        ([2, 1, 8, 8, 8], [2, 8, 8, 8, 8], [2, 2, 8, 8, 8], [[2, n, 8, 8, 8] for n in (1, 8, 2)]),
    ],
    ids=["volumes", "terms", "slices", "fixed"],
)  # fmt: skip
def test_axes_are_named(given, inner, returned, expected):
    one = graph(given, inner, returned)
    _name_axes(one, ["batch", "channel", *"zyx"[5 - len(given) :]])
    assert shapes(one) == expected
