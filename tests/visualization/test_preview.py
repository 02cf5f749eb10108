"""Previews show the batches of `training_step` with their places, and do not change a training."""

from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from cellmap_lightning.callbacks import BatchPreview
from cellmap_lightning.errors import CellMapKeyError, CellMapTypeError, CellMapValueError
from cellmap_lightning.transforms.spatial import rotation
from cellmap_lightning.visualization.preview import PreviewSample, collect, describe_transforms, show, spread
from tests.commands.test_cli import run_forked
from tests.runs import Watch, module, task, trainer
from tests.visualization.drawings import Page

Image = pytest.importorskip("PIL.Image")
AUGMENTED = {
    "spatial_transforms": {
        "mirror": {"axes": {"x": 0.5, "y": 0.5, "z": 0.5}},
        "transpose": {"axes": ["y", "x"]},
        "rotate": {"axes": {"z": [-180, 180]}},
    },
    "intensity_transforms": {"noise": [0.01, 0.05], "cutout": {"probability": 0.25, "size": [20, 80]}},
}


# -- the same batches


def test_preview_shows_the_batches_of_training_step(volume, tmp_path, quiet_lightning, no_threads_left):
    watch = Watch()
    with module(volume, **AUGMENTED) as data:
        trainer(tmp_path, max_epochs=2, limit_val_batches=0, callbacks=[watch]).fit(task(), datamodule=data)
    for epoch in range(2):
        with module(volume, **AUGMENTED) as data:
            shown = collect(data.train_dataloader(), 5, epoch)
        assert len(shown) == 5
        batches = watch.batches[3 * epoch : 3 * epoch + 3]
        raw, labels = (torch.cat([batch[name] for batch in batches]) for name in ("raw", "labels"))
        for row, one in enumerate(shown):
            assert np.array_equal(one.sample.raw, raw[row, 0].numpy())
            assert np.array_equal(one.sample.target, labels[row].numpy(), equal_nan=True)
            assert one.sample.header.startswith(f"sample {6 * epoch + row}")
            assert "noise 0.01 to 0.05, cutout 25%" in one.sample.header


def test_validation_tiles_are_shown_in_order(volume):
    with module(volume) as data:
        loader = data.val_dataloader()
        shown = collect(loader, 3)
        assert len(shown) == 3
        positions = [loader.source.tile(n) for n in list(loader.dataset.tiles)[:3]]
        for one, position in zip(shown, positions, strict=True):
            assert dict(zip("zyx", one.center, strict=True)) == loader.source.get_center(position)
            assert "not turned" in one.sample.header


def test_box_contains_the_turned_patch(volume):
    with module(volume, spatial_transforms=AUGMENTED["spatial_transforms"]) as data:
        loader = data.train_dataloader()
        numbers = [0, 1, 2, 3]
        draws = loader.dataset.draws(numbers)
        batch = loader.layout.finish(loader.source.read(draws))
        for one, draw in zip(show(loader.source, loader.layout, batch, draws), draws, strict=True):
            corners = np.array(list(np.ndindex(2, 2, 2))) - 0.5
            world = one.center + (corners * np.multiply([8, 16, 24], [10.48, 8, 8])) @ draw.turn.T
            text = one.sample.header.split("box ")[1].split(" nm")[0].split()[1::2]
            shown = np.array([[float(v) for v in part.split("..")] for part in text]).T
            assert np.allclose(shown, [world.min(axis=0), world.max(axis=0)], atol=0.51)
        # Draws that are not those of the batch are ignored.
        assert "sample" not in show(loader.source, loader.layout, batch, draws[::-1])[0].sample.header.split()[0]


@pytest.mark.parametrize(
    ("turn", "words"),
    [
        (None, "not turned"),
        (np.eye(3), "not turned"),
        (np.diag([1.0, -1, 1]), "mirrored along y"),
        (np.eye(3)[[0, 2, 1]], "axes z y x show z x y"),
        (rotation("z", 30), "rotated by 30.0° about z"),
        (rotation("z", 30) @ np.diag([-1.0, 1, 1]), "mirrored along z, rotated by 30.0° about z"),
        (rotation("z", 90), "axes z y x show z x y, mirrored along"),
        (np.diag([0.5, 0.5, 0.5]), "zoomed 2.00 times"),
        (np.diag([1, 0.5, 1.25]) @ rotation("z", 30), "rotated by 30.0° about z, zoomed z 1.00 y 2.00 x 0.80 times"),
        (np.diag([1, 0.5, 0.5]) @ np.diag([1.0, -1, 1]), "mirrored along y, zoomed z 1.00 y 2.00 x 2.00 times"),
        (np.array([[1, 0, 0], [0, 1, 0], [-0.2, 0, 1.0]]), "rotated by 5.7° about y, sheared, by 0.90 to 1.10 times"),
    ],
)
def test_describe_transforms(volume, turn, words):
    with module(volume) as data:
        assert describe_transforms(turn, data.val_dataset.layout).startswith(words)


# -- the command


def test_command_writes_a_sheet_and_a_page(volume, tmp_path):
    settings = [
        f"data.csv_path={volume.csv_path}",
        "data.classes=[mito,er]",
        "patch.shape=[8,16,16]",
        "patch.scale=[10.48,8,8]",
    ]
    code, text = run_forked(*settings, "samples=3", "html=true", "out=see/it.png", cwd=tmp_path, command="preview")
    assert code == 0, text
    links = (tmp_path / "see" / "it-links.txt").read_text()
    assert links.count("neuroglancer") == links.count("napari.run()") == 3
    with Image.open(tmp_path / "see" / "it.png") as picture:
        assert picture.width > 900
    page = Page(tmp_path / "see" / "it.html")
    assert [len(slices) for slices in page.data] == [8, 8, 8]
    assert "it/s" not in text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["data.clases=[mito]"], "did you mean 'data.classes'?"),
        (["data.csv_path=nowhere.csv"], "the CSV of crops nowhere.csv does not exist"),
        (["split=tain"], "split must be one of train, val, test, got 'tain'; did you mean 'train'?"),
        (["samples=0"], "samples must be a whole number of at least 1, got 0"),
        (["epoch=-1"], "epoch must be a whole number of at least 0, got -1"),
        (["out=preview.html"], "out must be a .png, .pdf or .svg file, got 'preview.html'"),
        (["overlay=fil"], "overlay must be one of outline, fill, got 'fil'; did you mean 'fill'?"),
        (["patch.scale=[1,1,1]"], "5.24x finer along z"),
        (["data.classes=[mito,golgi]"], "no crop for 'train' annotates 'golgi'"),
    ],
    ids=lambda a: a[0] if isinstance(a, list) else "",
)
def test_invalid_arguments_are_one_line_errors(volume, tmp_path, arguments, expected):
    settings = [
        f"data.csv_path={volume.csv_path}",
        "data.classes=[mito,er]",
        "patch.shape=[8,16,16]",
        "patch.scale=[10.48,8,8]",
    ]
    code, text = run_forked(*settings, *arguments, cwd=tmp_path, command="preview")
    assert code == 1
    assert expected in text
    assert "Traceback" not in text


# -- the callback


class Noisy(L.Callback):
    """Records weights, running means and the state of the random numbers at the end of every epoch."""

    def __init__(self):
        self.seen = []

    def on_train_epoch_start(self, trainer, pl_module):
        pl_module.network[1].eval()  # a frozen layer, which must stay so

    def on_train_epoch_end(self, trainer, pl_module):
        weights = [p.detach().clone() for p in pl_module.network.state_dict().values()]
        self.seen.append((weights, torch.random.get_rng_state(), [m.training for m in pl_module.modules()]))


def network():
    torch.manual_seed(0)
    model = task()
    model.network = torch.nn.Sequential(
        torch.nn.Conv3d(1, 4, 3, padding=1),
        torch.nn.BatchNorm3d(4),
        torch.nn.Dropout(0.5),
        torch.nn.BatchNorm3d(4),
        torch.nn.Conv3d(4, 3, 1),
    )
    return model


def fit(volume, tmp_path, preview, logger=False, epochs=2, **kwargs):
    watch = Noisy()
    callbacks = [watch] + ([preview] if preview else [])
    torch.manual_seed(1)
    with module(volume) as data:
        trainer(tmp_path, max_epochs=epochs, callbacks=callbacks, logger=logger, **kwargs).fit(
            network(), datamodule=data
        )
    return watch.seen


def test_batch_preview_does_not_change_the_training(volume, tmp_path, quiet_lightning, no_threads_left):
    without = fit(volume, tmp_path / "a", None)
    for split in ("train", "val"):
        seen = fit(volume, tmp_path / split, BatchPreview(split=split))
        for (weights, state, modes), (others, other_state, other_modes) in zip(without, seen, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
            assert torch.equal(state, other_state)
            assert modes == other_modes
        files = sorted(p.name for p in (tmp_path / split / "previews").iterdir())
        assert files == [f"{split}-epoch0000.png", f"{split}-epoch0001.png"]


def test_csv_logger_gets_pngs_every_n_epochs(volume, tmp_path, quiet_lightning):
    logger = CSVLogger(tmp_path, name="", version="")
    fit(volume, tmp_path, BatchPreview(every_n_epochs=2, samples=1), logger, epochs=3)
    assert sorted(p.name for p in (tmp_path / "previews").iterdir()) == ["train-epoch0000.png", "train-epoch0002.png"]
    fit(volume, tmp_path / "never", BatchPreview(every_n_epochs=0), epochs=1)
    assert not (tmp_path / "never" / "previews").exists()


def test_batch_preview_draws_the_batch_of_the_step(volume, tmp_path, quiet_lightning, monkeypatch):
    """Samples, their transforms and predictions, as they are passed to the sheet; the sheet is drawn too."""
    from cellmap_lightning.callbacks import preview

    drawn, real = [], preview.contact_sheet
    monkeypatch.setattr(
        preview, "contact_sheet", lambda samples, *a, **k: drawn.append(samples) or real(samples, *a, **k)
    )
    watch = Watch()
    with module(volume, spatial_transforms=AUGMENTED["spatial_transforms"]) as data:
        model = network()
        trainer(
            tmp_path, max_epochs=2, limit_val_batches=0, callbacks=[watch, BatchPreview()], limit_train_batches=2
        ).fit(model, datamodule=data)
    assert len(drawn) == 2
    for epoch, samples in enumerate(drawn):
        batch = watch.batches[2 * epoch]
        for row, sample in enumerate(samples):
            assert np.array_equal(sample.raw, batch["raw"][row, 0].numpy())
            assert np.array_equal(sample.target, batch["labels"][row].numpy(), equal_nan=True)
            assert sample.header.startswith(f"sample {6 * epoch + row}   ·   volume/crop")
            assert sample.prediction.shape == sample.target.shape
            assert 0 < sample.prediction.min() < sample.prediction.max() < 1


def test_tensorboard_gets_the_picture(volume, tmp_path, quiet_lightning):
    pytest.importorskip("tensorboardX")
    from lightning.pytorch.loggers import TensorBoardLogger

    fit(volume, tmp_path, BatchPreview(every_n_epochs=3), TensorBoardLogger(tmp_path, name="", version=""), epochs=1)
    (events,) = tmp_path.glob("events*")
    assert b"preview/train" in events.read_bytes()
    assert b"\x89PNG" in events.read_bytes()


def test_wandb_gets_the_picture(volume, tmp_path, quiet_lightning):
    pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger

    logger = WandbLogger(save_dir=tmp_path, offline=True)
    fit(volume, tmp_path, BatchPreview(every_n_epochs=3), logger, epochs=1)
    logger.experiment.finish()
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/images/preview/train*.png"))


def test_invalid_settings_are_refused_and_any_model_runs(volume, tmp_path, quiet_lightning, caplog):
    for wrong, error in (
        ({"every_n_epochs": -1}, CellMapValueError),
        ({"samples": 0}, CellMapValueError),
        ({"split": "tain"}, CellMapKeyError),
        ({"overlay": "fil"}, CellMapKeyError),
    ):
        with pytest.raises(error, match="BatchPreview"):
            BatchPreview(**wrong)
    with pytest.raises(CellMapKeyError, match="input_name='rw' is not in input_arrays; there are raw"):
        fit(volume, tmp_path, BatchPreview(input_name="rw"))

    class Five(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv3d(1, 5, 1)

        def forward(self, x):
            return self.conv(x)

        def training_step(self, batch, batch_idx):
            return self(batch["raw"]).mean()

        def validation_step(self, batch, batch_idx):
            """Lightning asks for one."""

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    with module(volume) as data:
        runs = trainer(tmp_path, limit_val_batches=0, callbacks=[BatchPreview()])
        runs.fit(Five(), datamodule=data)
        assert "BatchPreview: the pictures show no predictions: Five: forward must return logits" in caplog.text
        trainer(tmp_path, limit_val_batches=0, callbacks=[BatchPreview(predictions=False)]).fit(Five(), datamodule=data)
    assert Path(tmp_path / "previews" / "train-epoch0000.png").exists()
    loader = torch.utils.data.DataLoader([{"raw": torch.zeros(1, 2, 2, 2)}])
    with pytest.raises(CellMapTypeError, match="needs a CellMapDataModule"):
        trainer(tmp_path, limit_val_batches=0, callbacks=[BatchPreview()]).fit(Five(), loader, loader)


def test_real_volume_has_outlines_on_its_membranes(real_volume, tmp_path):
    """Membranes are dark: raw is darker inside their targets than outside, in each sample as it is drawn."""
    base = real_volume / "recon-1"
    (tmp_path / "crops.csv").write_text(
        f'train,{base}/em/fibsem-uint8,"{base}/labels/groundtruth/crop1/[mito,membrane]"\n', encoding="utf-8"
    )
    from cellmap_lightning import CellMapDataModule

    patch = {"shape": [16, 128, 128], "scale": [50, 4.6, 4.6]}
    with CellMapDataModule(
        ["mito", "membrane"], {"raw": patch}, {"labels": patch}, tmp_path / "crops.csv", batch_size=2, **AUGMENTED
    ) as data:
        shown = collect(data.train_dataloader(), 4)
    for one in shown:
        inside, outside = (one.sample.raw[one.sample.target[1] == value].mean() for value in (1, 0))
        assert inside < outside - 0.1


def placed(crop, x, number=None):
    return PreviewSample(None, crop, (0.0, 0.0, float(x)), "", "", number)


@pytest.mark.parametrize("numbers", [(0, 5, 2, 7), (3, 2, 1, 0), (0, 1, 2, 3)])
def test_chosen_samples_are_in_the_order_of_their_numbers(numbers):
    previews = [placed("a", 10 * place, number) for place, number in enumerate(numbers)]
    assert [one.number for one in spread(previews, 4)] == sorted(numbers)
    assert [one.number for one in spread(previews, 2)] == sorted([numbers[0], numbers[3]])


def test_samples_of_tiles_are_sorted_and_have_their_numbers(volume):
    with module(volume) as data:
        data.setup("validate")
        shown = collect(data.val_dataloader(), 6, candidates=24)
    numbers = [one.number for one in shown]
    assert numbers == sorted(set(numbers))
    assert [one.sample.header.split()[1] for one in shown] == [str(number) for number in numbers]


@pytest.mark.parametrize(
    ("places", "count", "expected"),
    [
        ([("a", 0), ("a", 1), ("a", 2), ("b", 0)], 2, [("a", 0), ("b", 0)]),
        ([("a", 0), ("a", 1), ("a", 9), ("a", 4)], 3, [("a", 0), ("a", 9), ("a", 4)]),
        ([("a", 0), ("a", 5), ("b", 0), ("b", 1), ("b", 7)], 4, [("a", 0), ("a", 5), ("b", 0), ("b", 7)]),
        ([("a", 0), ("a", 0)], 2, [("a", 0), ("a", 0)]),
        ([("a", 0)], 3, [("a", 0)]),
    ],
)
def test_samples_of_different_crops_and_places_are_chosen(places, count, expected):
    chosen = spread([placed(*place) for place in places], count)
    assert [(one.crop, int(one.center[2])) for one in chosen] == expected


def test_reading_goes_on_until_each_crop_has_a_sample(volume):
    rare = {"strategy": {"name": "weighted", "weights": [8, 1]}}
    lacking = False
    with module(volume, batch_size=1, batches_per_epoch=40, **rare) as data:
        loader = data.train_dataloader()
        for epoch in range(8):
            crops = [one.crop for one in collect(loader, 12, epoch)]
            lacking |= len(set(crops[:3])) == 1 and len(set(crops)) == 2
            assert {one.crop for one in collect(loader, 2, epoch, candidates=3)} == set(crops)
            assert [one.crop for one in collect(loader, 2, epoch)] == crops[:2]
    assert lacking  # in an epoch, the first three samples are of one crop, and the next nine have the other


def test_samples_are_chosen_among_the_first_ones(volume):
    with module(volume) as data:
        data.setup("fit")
        first, chosen = collect(data.train_dataloader(), 6), collect(data.train_dataloader(), 3, candidates=6)
    assert [one.sample.header for one in chosen] == [one.sample.header for one in spread(first, 3)]
    assert len({one.crop for one in chosen}) == min(3, len({one.crop for one in first}))
