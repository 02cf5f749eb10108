"""Slices along each axis of a volume, predicted by a 2D model: every voxel is written where it was read."""

import lightning as L
import numpy as np
import pytest
import torch
import zarr

from cellmap_lightning import CellMapDataModule, compat
from cellmap_lightning.callbacks import make_prediction_writer
from cellmap_lightning.compat.utils import permute_singleton_dimension
from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.geometry.lattice import AXES
from cellmap_lightning.io.writer import ArrayOptions, write_multiscale

pytestmark = pytest.mark.usefixtures("quiet_lightning", "no_threads_left")

#: No axis is a multiple of a patch's, so that the last patch along each overlaps the one before it.
SHAPE, SCALE, SLICE = (11, 14, 17), (8.0, 8.0, 8.0), (1, 5, 6)
RAMP = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    path = tmp_path_factory.mktemp("ramp") / "raw.zarr" / "em"
    write_multiscale(
        path,
        RAMP.astype(np.uint16),
        scale=SCALE,
        translation=(4, 0, 20),
        levels=1,
        storage=ArrayOptions(chunks=(8, 8, 8)),
    )
    return path


def read(path, name="a"):
    return zarr.open_array(str(path / name / "s0"), mode="r")[...]


def along(axis, name):
    """Slices along an axis, in the way in which the challenge's toolbox makes them."""
    arrays = {name: {"shape": SLICE, "scale": SCALE}}
    permute_singleton_dimension(arrays, axis)
    return arrays


def writer_of(raw, out, axis, **kwargs):
    return compat.CellMapDatasetWriter(str(raw), str(out), ["a"], along(axis, "input"), along(axis, "output"), **kwargs)


def predict(writer, axis, model):
    """The loop of the challenge's toolbox: the axis of length 1 is squeezed for the model, and put back."""
    with writer:
        for batch in writer.loader(batch_size=4):
            outputs = model(batch["input"].squeeze(dim=axis + 2)).unsqueeze(dim=axis + 2)
            writer[batch["idx"]] = {"output": outputs}


def same(images):
    assert images.ndim == 4
    return images


def blur(images):
    """Each pixel and its neighbour in the row: a model that gives something else in each plane."""
    return (same(images) + torch.cat([images[..., :1], images[..., :-1]], -1)) / 2


@pytest.mark.parametrize("axis", range(3))
def test_the_writer_gives_the_shapes_of_cellmap_data(raw, tmp_path, axis):
    shape = along(axis, "a")["a"]["shape"]
    expected = tuple(shape) if axis == 0 else (1, *shape)
    with writer_of(raw, tmp_path / "out.zarr", axis) as writer:
        assert writer[3]["input"].shape == expected
        batches = list(writer.loader(batch_size=4))
        assert {b["input"].shape[1:] for b in batches} == {expected if axis else (1, *shape[1:])}
        assert len(batches) == len(writer.loader(batch_size=4))
        torch.testing.assert_close(
            batches[0]["input"][1].reshape(shape), writer[int(batches[0]["idx"][1])]["input"].reshape(shape)
        )


@pytest.mark.parametrize("axis", range(3))
def test_a_ramp_comes_back_slice_by_slice(raw, tmp_path, axis):
    predict(writer_of(raw, tmp_path / "loader.zarr", axis), axis, same)
    np.testing.assert_array_equal(read(tmp_path / "loader.zarr"), RAMP)
    with writer_of(raw, tmp_path / "items.zarr", axis) as writer:
        for index in writer.writer_indices:
            writer[index] = {"a": writer[index]["input"]}
    np.testing.assert_array_equal(read(tmp_path / "items.zarr"), RAMP)


@pytest.mark.parametrize("axis", range(3))
def test_a_part_of_the_volume_slice_by_slice(raw, tmp_path, axis):
    first, count = (2, 3, 1), (7, 6, 9)
    box = {a: [t - 4 + 8 * f, t - 4 + 8 * (f + n)] for a, t, f, n in zip(AXES, (4, 0, 20), first, count, strict=True)}
    writer = writer_of(raw, tmp_path / "out.zarr", axis, target_bounds={"output": box})
    predict(writer, axis, same)
    np.testing.assert_array_equal(
        read(tmp_path / "out.zarr"), RAMP[tuple(slice(f, f + n) for f, n in zip(first, count, strict=True))]
    )


@pytest.mark.parametrize("axis", range(3))
def test_slices_are_written_by_their_centres(tmp_path, axis):
    shape = along(axis, "a")["a"]["shape"]
    box = {a: [0, 8 * n] for a, n in zip(AXES, SHAPE, strict=True)}
    image = compat.ImageWriter(str(tmp_path / "out.zarr" / "a"), "a", SCALE, box, shape)
    for index in np.ndindex(*(-(-n // m) for n, m in zip(SHAPE, shape, strict=True))):
        part = RAMP[tuple(slice(i * n, (i + 1) * n) for i, n in zip(index, shape, strict=True))]
        patch = np.pad(part, [(0, n - m) for n, m in zip(shape, part.shape, strict=True)])
        image[{a: 8 * (i + 0.5) * n for a, i, n in zip(AXES, index, shape, strict=True)}] = torch.from_numpy(patch)[
            None
        ]
    np.testing.assert_array_equal(read(tmp_path / "out.zarr"), RAMP)


@pytest.mark.parametrize("axis", range(3))
def test_a_transposed_slice_is_refused(raw, tmp_path, axis):
    with (
        writer_of(raw, tmp_path / "out.zarr", axis) as writer,
        pytest.raises(CellMapValueError, match=r"output: the shape must be .*, got"),
    ):
        writer[0] = {"output": writer[0]["input"].reshape(1, 1, *SLICE[1:]).transpose(-1, -2)}


def blurred(axis):
    """The result of `blur` for whole slices along an axis: rows run along z in slices along x, else along x."""
    row = 1 if axis == 2 else 2
    before = np.concatenate([RAMP.take([0], row), RAMP.take(range(SHAPE[row] - 1), row)], row)
    return (RAMP + before) / 2


def test_the_mean_over_three_orientations(raw, tmp_path):
    """The steps of the challenge's toolbox with a 2D model: a prediction along each axis, then their mean, in tiles."""
    whole = {0: (1, 14, 17), 1: (11, 1, 17), 2: (11, 14, 1)}
    for axis in range(3):
        spec = {"shape": whole[axis], "scale": SCALE}
        writer = compat.CellMapDatasetWriter(
            str(raw), str(tmp_path / "planes.zarr" / str(axis)), ["a"], {"input": spec}, {"output": spec}
        )
        predict(writer, axis, blur)
        np.testing.assert_array_equal(read(tmp_path / "planes.zarr" / str(axis)), blurred(axis))
    images = [
        compat.CellMapImage(str(tmp_path / "planes.zarr" / str(axis) / "a"), "a", SCALE, SLICE, pad=True, pad_value=0)
        for axis in range(3)
    ]
    with writer_of(raw, tmp_path / "mean.zarr", 0) as writer:
        for batch in writer.loader(batch_size=4):
            centers = [writer.get_center(index) for index in batch["idx"]]
            means = [torch.stack([image[center] for image in images]).mean(dim=0) for center in centers]
            writer[batch["idx"]] = {"output": {"a": torch.stack(means)}}
    expected = np.mean([blurred(axis) for axis in range(3)], axis=0)
    np.testing.assert_allclose(read(tmp_path / "mean.zarr"), expected, rtol=1e-6)


class Sliced(L.LightningModule):
    """A 2D network, whose output shows which way its rows ran."""

    def predict_step(self, batch, batch_idx):
        return blur(batch["raw"]) if self.blurs else same(batch["raw"])

    def __init__(self, blurs=False):
        super().__init__()
        self.blurs = blurs


def predict_natively(raw, out, arrays, model, **kwargs):
    given = {"dtype": "float32", "chunks": [4, 8, 8], "block_size_mb": 0.05, "check_context": False} | kwargs
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[make_prediction_writer(str(out), **given)],
    )  # fmt: skip
    volumes = {"predict": [{"raw": str(raw)}]}
    with CellMapDataModule(["a"], datasets=volumes, raw_value_transforms=None, batch_size=3, **arrays) as data:
        trainer.predict(model, datamodule=data)


@pytest.mark.parametrize("blending", [{"overlap": 0.4}, {"blend": "average", "overlap": 0.5}], ids=["trim", "average"])
@pytest.mark.parametrize("axis", range(3))
def test_a_trainer_writes_slices_along_each_axis(raw, tmp_path, axis, blending):
    predict_natively(raw, tmp_path / "out.zarr", {"input_arrays": along(axis, "raw")}, Sliced(), **blending)
    np.testing.assert_array_equal(read(tmp_path / "out.zarr"), RAMP)


def test_a_trainer_writes_the_mean_over_three_orientations(raw, tmp_path):
    """The same mean as that of the writers above, in one run and by patches with context."""
    arrays = {"input_arrays": {"raw": {"shape": [8, 8], "scale": [8, 8]}}, "planes": ["xy", "xz", "yz"]}
    predict_natively(raw, tmp_path / "out.zarr", arrays, Sliced(blurs=True), context=2)
    expected = np.mean([blurred(axis) for axis in range(3)], axis=0)
    np.testing.assert_allclose(read(tmp_path / "out.zarr"), expected, rtol=1e-6)
