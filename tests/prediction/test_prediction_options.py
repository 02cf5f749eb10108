import pytest

from cellmap_lightning.callbacks import (
    BlendOptions,
    ChannelOptions,
    OutputOptions,
    PredictionWriter,
    RegionOptions,
    ResumeOptions,
    make_prediction_writer,
)
from cellmap_lightning.errors import CellMapTypeError, CellMapValueError

BOX = {"z": [0, 80], "y": [0, 160], "x": [8, 160]}


def test_flat_settings_are_the_grouped_options(tmp_path):
    output = str(tmp_path / "out.zarr")
    flat = make_prediction_writer(
        output, block_size_mb=64, blend="gaussian", tta_flips="xy", only=["er"], dtype="labels",
        chunks=[8, 8, 16], region=BOX, overwrite=True,
    )  # fmt: skip
    grouped = PredictionWriter(
        output, BlendOptions("gaussian", tta_flips="xy"), channels=ChannelOptions(only=["er"]),
        storage=OutputOptions(dtype="labels", chunks=[8, 8, 16]), region=RegionOptions(BOX),
        resume=ResumeOptions(overwrite=True), block_size_mb=64,
    )  # fmt: skip
    assert flat.options == grouped.options
    assert (flat.options.blending.flips, flat.options.storage.unit) == ("yx", (8, 8, 16))
    assert list(flat.options.region.box.lower) == [0, 0, 8]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"blnd": "trim"}, "no setting 'blnd'; did you mean 'blend'"),
        ({"threshhold": 0.5}, "did you mean 'threshold'"),
        ({"storage": OutputOptions()}, "no setting 'storage'"),
    ],
)
def test_unknown_flat_setting(tmp_path, settings, match):
    with pytest.raises(CellMapTypeError, match=match):
        make_prediction_writer(str(tmp_path / "out.zarr"), **settings)


def test_flat_settings_of_the_callback():
    with pytest.raises(CellMapTypeError, match=r"'blend'; use blending=BlendOptions\(blend=\.\.\.\)"):
        PredictionWriter("out.zarr", blend="gaussian")
    with pytest.raises(CellMapTypeError, match=r"'chunks'; use storage=OutputOptions\(chunks=\.\.\.\)"):
        PredictionWriter("out.zarr", chunks=(8, 8, 8))
    with pytest.raises(CellMapTypeError, match=r"'storge'; did you mean 'storage'"):
        PredictionWriter("out.zarr", storge=OutputOptions())


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: BlendOptions("mean"), "blend"),
        (lambda: ChannelOptions(activation="relu"), "activation"),
        (lambda: OutputOptions(shards=(128, 128, 128)), "shards need zarr_format=3"),
        (lambda: OutputOptions(3, chunks=(64, 64)), "chunks must be three positive"),
        (lambda: RegionOptions({"z": [0, 8]}), "region must be"),
        (lambda: PredictionWriter("out.zarr", block_size_mb=0), "block_size_mb"),
    ],
)
def test_invalid_options(make, match):
    with pytest.raises(CellMapValueError, match=match):
        make()
