"""Links and commands that show a place in a viewer."""

import ast
import json
import shlex
from urllib.parse import unquote

from cellmap_lightning.visualization.viewer_links import napari, neuroglancer


def test_links_contain_the_place(tmp_path):
    labels = {"mito": str(tmp_path / "crop1" / "mito"), "er": "s3://b/er"}
    link = neuroglancer(str(tmp_path / "a b.zarr"), labels, (475.0, 1524.9, 430.1), 4.6, "http://localhost:9000/")
    address, state = link.split("#!")
    assert address.startswith("https://")
    view = json.loads(unquote(state))
    assert view["dimensions"] == {axis: [1e-9, "m"] for axis in "zyx"}
    assert view["position"] == [475.0, 1524.9, 430.1]
    assert [layer["source"] for layer in view["layers"]] == [
        f"zarr://http://localhost:9000{tmp_path}/a%20b.zarr", f"zarr://http://localhost:9000{tmp_path}/crop1/mito",
        "zarr://s3://b/er",
    ]  # fmt: skip
    words = shlex.split(napari(str(tmp_path / "it's"), labels, (475.0, 1524.9, 430.1)))
    assert words[:2] == ["python", "-c"]
    calls = [ast.unparse(node) for node in ast.parse(words[2]).body]
    assert any(repr(str(tmp_path / "it's")) in call for call in calls)
    assert "v.dims.set_point(range(3), (475.0, 1524.9, 430.1))" in calls
