"""OME-NGFF images written by zarr-python and json alone, as other programs would."""

import json

import numpy as np
import pytest
import zarr


@pytest.fixture
def write(tmp_path):
    """Write an image; returns its path. Levels are ``{name: (array in stored order, scale, translation)}``."""

    def write(
        levels, *, version="0.4", axes="zyx", unit="nanometer", common=None, attributes=None, name="image", **array
    ):
        path = tmp_path / name
        v3 = version == "0.5"
        group = zarr.open_group(path, mode="w", zarr_format=3 if v3 else 2)
        datasets = []
        for level, (data, scale, translation) in levels.items():
            steps = [{"type": "scale", "scale": list(scale)}]
            if translation is not None:
                steps.append({"type": "translation", "translation": list(translation)})
            datasets.append({"path": level, "coordinateTransformations": steps})
            if data is None:
                continue  # listed, and not on disk
            data = np.asarray(data)
            more = {"dimension_names": list(axes)} if v3 else {}
            stored = group.create_array(
                level, shape=data.shape, dtype=data.dtype, chunks=array.get("chunks", data.shape), **more
            )
            stored[...] = data
        kinds = {"c": "channel", "t": "time"}
        described = []
        for a in axes:
            described.append({"name": a, "type": kinds.get(a, "space")})
            if a in "zyx" and unit is not None:
                described[-1]["unit"] = unit
        image = {"version": "0.4", "name": name, "axes": described, "datasets": datasets}
        if common is not None:
            image["coordinateTransformations"] = common
        if v3:
            del image["version"]
            group.attrs.update({"ome": {"version": "0.5", "multiscales": [image]}} | (attributes or {}))
        else:
            group.attrs.update({"multiscales": [image]} | (attributes or {}))
        return path

    return write


@pytest.fixture
def edit():
    """Change the JSON of a metadata file in place: ``edit(file, change)``."""

    def edit(file, change):
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    return edit
