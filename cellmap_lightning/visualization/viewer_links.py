"""Neuroglancer links and napari commands that show a place in a volume.

Neither viewer needs to be installed. Credentials in addresses are hidden in both.
"""

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from urllib.parse import quote

from cellmap_lightning.io.store import local_path
from cellmap_lightning.redaction import hide_address

NEUROGLANCER = "https://neuroglancer-demo.appspot.com"


def neuroglancer(
    raw: str,
    labels: Mapping[str, str],
    center: Sequence[float],
    nm_per_pixel: float,
    serve: str = "http://localhost:8000",
) -> str:
    """Return a link to Neuroglancer at a place.

    A browser cannot read local folders: they have to be served with CORS headers, such as by
    ``npx http-server / --cors -p 8000``.

    Args:
        raw: the raw multiscale group.
        labels: the group of each class.
        center: the place, nm (z, y, x).
        nm_per_pixel: zoom of the view.
        serve: the address under which the root of the file system is served.
    """

    def source(path: str) -> str:
        if "://" in path and not path.startswith("file://"):
            return f"zarr://{hide_address(path)}"
        return f"zarr://{serve.rstrip('/')}{quote(os.fspath(local_path(path).absolute()))}"

    state = {
        # With a unit of one nanometre, the position is in nm.
        "dimensions": {axis: [1e-9, "m"] for axis in "zyx"},
        "position": [round(float(c), 3) for c in center],
        "crossSectionScale": round(float(nm_per_pixel), 3),
        "layers": [
            {"type": "image", "source": source(raw), "name": "raw"},
            *({"type": "segmentation", "source": source(path), "name": name} for name, path in labels.items()),
        ],
        "layout": "4panel",
    }
    return f"{NEUROGLANCER}/#!{quote(json.dumps(state, separators=(',', ':')))}"


def napari(raw: str, labels: Mapping[str, str], center: Sequence[float]) -> str:
    """Return a shell command that shows a place in napari; running it needs napari and its plugin napari-ome-zarr.

    Args:
        raw: the raw multiscale group.
        labels: the group of each class.
        center: the place, nm (z, y, x).
    """
    z, y, x = (round(float(c), 3) for c in center)
    lines = ["import napari", "v = napari.Viewer()", f'v.open({_quoted(raw)}, plugin="napari-ome-zarr")']
    lines += [f'v.open({_quoted(path)}, plugin="napari-ome-zarr", layer_type="labels")' for path in labels.values()]
    lines += [f"v.dims.set_point(range(3), ({z}, {y}, {x}))", f"v.camera.center = ({z}, {y}, {x})", "napari.run()"]
    return f"python -c {shlex.quote('; '.join(lines))}"


def _quoted(path: str) -> str:
    """Return a path in double quotes, which a shell does not interpret inside single ones."""
    return json.dumps(hide_address(path) if "://" in path else str(local_path(path).absolute()), ensure_ascii=False)
