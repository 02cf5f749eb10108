"""N5 and precomputed volumes behind an HTTP server."""

import functools
import http.server
import threading

import numpy as np
import pytest

from cellmap_lightning import CellMapDataset
from cellmap_lightning.crops.options import ReadOptions
from cellmap_lightning.io.images import image_exists, read_image
from cellmap_lightning.io.readers import open_reader
from cellmap_lightning.io.store import parse_location
from tests.io.formats import writers

VOXELS = np.random.default_rng(0).integers(1, 255, (24, 40, 64)).astype(np.uint8)
SHAPE = {"shape": [8, 16, 16], "scale": [8, 4, 4]}


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def address(tmp_path):
    """The address of the folder."""
    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("write", [writers.n5, writers.precomputed], ids=["n5", "precomputed"])
def test_boxes_over_http(tmp_path, address, write):
    path = write(tmp_path, VOXELS)
    url = f"{address}/{path.relative_to(tmp_path)}"
    assert image_exists(parse_location(url))
    assert not image_exists(parse_location(f"{address}/nothing"))
    level = read_image(url).finest
    assert (level.scale, level.lattice.shape) == ((8, 4, 4), VOXELS.shape)
    reader = open_reader(level)
    np.testing.assert_array_equal(reader.read((1, 2, 3), (20, 30, 40)), VOXELS[1:21, 2:32, 3:43])
    assert not reader.local
    assert reader.stamp((0, 0, 0), VOXELS.shape) == 1
    assert reader.identity()[2]  # the version that the server sends


def test_labels_over_http(tmp_path, address):
    """A crop of N5 class arrays beside raw of another format."""
    (tmp_path / "em").mkdir()
    writers.precomputed(tmp_path / "em", np.ones_like(VOXELS))
    (tmp_path / "crop").mkdir()
    path = writers.n5(tmp_path / "crop", np.ones_like(VOXELS))
    target = f"{address}/{path.parent.relative_to(tmp_path)}/[raw]"
    options = ReadOptions(voxel_size=[8, 4, 4], translation=[0, 0, 0])
    with CellMapDataset(
        f"{address}/em/volume", target, ["raw"], {"em": SHAPE}, {"labels": SHAPE}, read=options
    ) as dataset:
        sample = dataset[0]
    assert (sample["labels"] == 1).all()
    np.testing.assert_allclose(sample["em"].numpy(), 1 / 255, rtol=1e-6)
