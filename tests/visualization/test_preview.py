"""Previews show what a step sees, where it is, and leave a training as it was."""

import ast
import base64
import io
import json
import os
import shlex
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from cellmap_lightning.callbacks import BatchPreview
from cellmap_lightning.errors import CellMapKeyError, CellMapTypeError, CellMapValueError
from cellmap_lightning.transforms.spatial import rotation
from cellmap_lightning.visualization.figures.page import write_page
from cellmap_lightning.visualization.figures.sheet import SheetSample
from cellmap_lightning.visualization.figures.slices import contrast_limits
from cellmap_lightning.visualization.links import napari, neuroglancer
from cellmap_lightning.visualization.preview import collect, show, transforms
from tests.commands.test_cli import run_forked
from tests.runs import Watch, module, task, trainer

Image = pytest.importorskip("PIL.Image")
AUGMENTED = {
    "spatial_transforms": {
        "mirror": {"axes": {"x": 0.5, "y": 0.5, "z": 0.5}},
        "transpose": {"axes": ["y", "x"]},
        "rotate": {"axes": {"z": [-180, 180]}},
    },
    "intensity_transforms": {"noise": [0.01, 0.05]},
}


# -- the same batches


def test_what_is_shown_is_what_the_step_sees(volume, tmp_path, quiet_lightning, no_threads_left):
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
            assert "noise 0.01 to 0.05" in one.sample.header


def test_tiles_of_validation_are_shown_in_order(volume):
    with module(volume) as data:
        loader = data.val_dataloader()
        shown = collect(loader, 3)
        assert len(shown) == 3
        positions = [loader.source.tile(n) for n in list(loader.dataset.tiles)[:3]]
        for one, position in zip(shown, positions, strict=True):
            assert dict(zip("zyx", one.center, strict=True)) == loader.source.get_center(position)
            assert "not turned" in one.sample.header


def test_the_box_holds_the_patch_whatever_its_turn(volume):
    with module(volume, spatial_transforms=AUGMENTED["spatial_transforms"]) as data:
        loader = data.train_dataloader()
        numbers = [0, 1, 2, 3]
        draws = loader.dataset.draws(numbers)
        batch = loader.layout.finish(loader.source.read(draws))
        for one, draw in zip(show(loader.source, loader.layout, batch, draws), draws, strict=True):
            corners = np.array(list(np.ndindex(2, 2, 2))) - 0.5
            world = one.center + (corners * np.multiply([8, 16, 24], [10.48, 8, 8])) @ draw.turn.T
            text = one.sample.header.split("box ")[1].split(" nm")[0].split()[1::2]
            found = np.array([[float(v) for v in part.split("..")] for part in text]).T
            assert np.allclose(found, [world.min(axis=0), world.max(axis=0)], atol=0.51)
        # Other draws than those of the batch say nothing about it.
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
    ],
)
def test_transforms_in_words(volume, turn, words):
    with module(volume) as data:
        assert transforms(turn, data.val_dataset.layout).startswith(words)


# -- the page


class Page(HTMLParser):
    def __init__(self, path):
        super().__init__()
        self.tags, self.data, self._json = [], None, False
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._json = dict(attributes).get("type") == "application/json"

    def handle_data(self, data):
        if self._json:
            self.data, self._json = json.loads(data), False

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def samples():
    rng = np.random.default_rng(0)
    raw = rng.normal(0.5, 0.1, (5, 12, 16)).astype(np.float32)
    target = np.zeros((2, *raw.shape), np.float32)
    target[0, 1:4, 2:8, 3:9] = 1
    target[1, 3, 6:10, 5:15] = 1
    target[:, :, :, :2] = np.nan
    return [SheetSample(raw, target, 0.9 * np.nan_to_num(target), (50, 4, 4), "jrc_x/crop1 <b> & \u00b5")]


def covered(path, shape):
    """The voxels inside a path of whole-voxel outlines, by the parity of the edges to the left of each."""
    tta_flips = np.zeros((shape[0], shape[1] + 1), int)
    for line in path.split("Z")[:-1]:
        points = [tuple(map(int, p.split())) for p in line.lstrip("M").split("L")]
        for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1], strict=True):
            assert x0 == x1 or y0 == y1
            if x0 == x1:
                tta_flips[min(y0, y1) : max(y0, y1), x0] += 1
    return tta_flips.cumsum(axis=1)[:, :-1] % 2 == 1


def test_the_page_holds_every_slice_exactly(samples, tmp_path):
    write_page(
        samples, ["mito", "</script>er"], tmp_path / "a" / "page.html", title="t", links=[("https://n", "napari")]
    )
    page = Page(tmp_path / "a" / "page.html")
    (slices,) = page.data
    (sample,) = samples
    assert len(slices) == 5
    low, high = contrast_limits(sample.raw)
    for z, shapes in enumerate(slices):
        image = Image.open(io.BytesIO(base64.b64decode(shapes["raw"].removeprefix("data:image/png;base64,"))))
        grey = (np.clip((sample.raw[z] - low) / (high - low), 0, 1) * 255).round()
        assert np.array_equal(np.asarray(image), grey)
        for c in range(2):
            assert np.array_equal(covered(shapes["target"].get(str(c), ""), (12, 16)), sample.target[c, z] == 1)
            assert np.array_equal(
                covered(shapes["prediction"].get(str(c), ""), (12, 16)), sample.prediction[c, z] > 0.5
            )
        assert np.array_equal(covered(shapes["unknown"]["all"], (12, 16)), np.isnan(sample.target[:, z]).all(axis=0))
    # Nothing is loaded from elsewhere, and what names hold is text.
    assert not page.of("link")
    assert not any("src" in a or "href" in a for tag, a in page.tags if tag not in ("a", "img"))
    assert [a["href"] for a in page.of("a")] == ["https://n"]
    assert not any(a.get("src", "").startswith("http") for a in page.of("img"))
    assert len(page.of("script")) == 2
    (slider,) = [a for a in page.of("input") if a["type"] == "range"]
    assert (slider["min"], slider["max"], slider["value"]) == ("0", "4", "3")
    assert not page.of("b")


@pytest.mark.parametrize(
    "name",
    [
        "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "' onmouseover='alert(1)", "</title><b>x</b>",
        "</style></section><iframe>", "a&amp;<!-- <script>", "</code><svg onload=alert(1)>", "\\u003cscript>",
    ],
)  # fmt: skip
@pytest.mark.parametrize("where", ["title", "class", "header", "command", "address"])
def test_names_on_a_page_are_text(samples, tmp_path, name, where):
    """Names of datasets, crops and classes come from folders: as tags or attributes they could run scripts."""

    def page(text):
        sample = replace(samples[0], header=text if where == "header" else "header")
        write_page(
            [sample], ["mito", text if where == "class" else "er"], tmp_path / "page.html",
            title=text if where == "title" else "title",
            links=[(text if where == "address" else "https://n", text if where == "command" else "napari")],
        )  # fmt: skip
        return Page(tmp_path / "page.html")

    plain, found = page("plain"), page(name)
    where_href = {"href": name} if where == "address" else {}
    assert [(t, a | where_href if t == "a" else a) for t, a in plain.tags] == found.tags
    assert found.data == plain.data


def test_pages_refuse_what_does_not_fit(samples, tmp_path):
    with pytest.raises(CellMapValueError, match="at least one sample"):
        write_page([], [], tmp_path / "page.html")
    wrong = SheetSample(samples[0].raw, samples[0].target[..., 1:], None, (1, 1, 1))
    with pytest.raises(CellMapValueError, match="Sample 0 of the page: target has the shape"):
        write_page([wrong], ["a", "b"], tmp_path / "page.html")


def test_a_slider_in_a_browser(samples, tmp_path):
    """The page, opened in headless Chromium: the slider is moved and a class switched off, and the page follows."""
    names = (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next((path for name in names if name and (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip("there is no Chromium here; CHROMIUM=path names one")
    write_page(samples, ["mito", "er"], tmp_path / "page.html", title="t")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    move = """<script>
      const slider = document.querySelector('input[type=range]');
      slider.value = 1; slider.dispatchEvent(new Event('input'));
      const box = document.getElementById('class-1'); box.checked = false; box.dispatchEvent(new Event('change'));
    </script></body>"""
    (tmp_path / "moved.html").write_text(text.replace("</body>", move), encoding="utf-8")

    def opened(name):
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
        command += ["--dump-dom", (tmp_path / name).as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        (tmp_path / "dom.html").write_text(done.stdout, encoding="utf-8")
        return Page(tmp_path / "dom.html"), done.stdout

    slices = Page(tmp_path / "page.html").data[0]
    for name, z, shown in (("page.html", 3, ("0", "1")), ("moved.html", 1, ("0",))):
        page, text = opened(name)
        assert {a["src"] for a in page.of("img")} == {slices[z]["raw"]}
        assert f"<output>{z}</output>" in text
        for kind in ("target", "prediction"):
            drawn = {a["data-c"]: a.get("d", "") for a in page.of("path") if a.get("data-kind") == kind}
            expected = {c: slices[z][kind].get(c, "") if c in shown else "" for c in ("0", "1")}
            assert drawn == expected
        hatched = {a["d"] for a in page.of("path") if a.get("data-kind") == "unknown"}
        assert hatched == {slices[z]["unknown"]["all"]}


# -- links


def test_links_name_the_place(tmp_path):
    labels = {"mito": str(tmp_path / "crop1" / "mito"), "er": "s3://b/er"}
    link = neuroglancer(str(tmp_path / "a b.zarr"), labels, (475.0, 1524.9, 430.1), 4.6, "http://localhost:9000/")
    address, state = link.split("#!")
    assert address.startswith("https://")
    found = json.loads(unquote(state))
    assert found["dimensions"] == {axis: [1e-9, "m"] for axis in "zyx"}
    assert found["position"] == [475.0, 1524.9, 430.1]
    assert [layer["source"] for layer in found["layers"]] == [
        f"zarr://http://localhost:9000{tmp_path}/a%20b.zarr", f"zarr://http://localhost:9000{tmp_path}/crop1/mito",
        "zarr://s3://b/er",
    ]  # fmt: skip
    words = shlex.split(napari(str(tmp_path / "it's"), labels, (475.0, 1524.9, 430.1)))
    assert words[:2] == ["python", "-c"]
    calls = [ast.unparse(node) for node in ast.parse(words[2]).body]
    assert any(repr(str(tmp_path / "it's")) in call for call in calls)
    assert "v.dims.set_point(range(3), (475.0, 1524.9, 430.1))" in calls


# -- the command


def test_the_command_writes_a_sheet_and_a_page(volume, tmp_path):
    given = [
        f"data.csv_path={volume.csv_path}",
        "data.classes=[mito,er]",
        "patch.shape=[8,16,16]",
        "patch.scale=[10.48,8,8]",
    ]
    code, text = run_forked(*given, "samples=3", "html=true", "out=see/it.png", cwd=tmp_path, command="preview")
    assert code == 0, text
    assert text.count("neuroglancer") == text.count("napari.run()") == 3
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
        (["overlay=fil"], 'overlay must be "outline" or "fill"'),
        (["patch.scale=[1,1,1]"], "5.24x finer along z"),
        (["data.classes=[mito,golgi]"], "no crop for 'train' annotates 'golgi'"),
    ],
    ids=lambda a: a[0] if isinstance(a, list) else "",
)
def test_wrong_use_is_an_error_in_a_line(volume, tmp_path, arguments, expected):
    given = [
        f"data.csv_path={volume.csv_path}",
        "data.classes=[mito,er]",
        "patch.shape=[8,16,16]",
        "patch.scale=[10.48,8,8]",
    ]
    code, text = run_forked(*given, *arguments, cwd=tmp_path, command="preview")
    assert code == 1
    assert expected in text
    assert "Traceback" not in text


# -- the callback


class Noisy(L.Callback):
    """Keeps the weights, running means among them, and the random numbers of the end of every epoch."""

    def __init__(self):
        self.seen = []

    def on_train_epoch_start(self, trainer, pl_module):
        pl_module.network[1].eval()  # a frozen layer, which must stay so

    def on_train_epoch_end(self, trainer, pl_module):
        weights = [p.detach().clone() for p in pl_module.network.state_dict().values()]
        self.seen.append((weights, torch.random.get_rng_state(), [m.training for m in pl_module.modules()]))


def network():
    torch.manual_seed(0)
    made = task()
    made.network = torch.nn.Sequential(
        torch.nn.Conv3d(1, 4, 3, padding=1),
        torch.nn.BatchNorm3d(4),
        torch.nn.Dropout(0.5),
        torch.nn.BatchNorm3d(4),
        torch.nn.Conv3d(4, 3, 1),
    )
    return made


def fit(volume, tmp_path, preview, logger=False, epochs=2, **kwargs):
    watch = Noisy()
    callbacks = [watch] + ([preview] if preview else [])
    torch.manual_seed(1)
    with module(volume) as data:
        trainer(tmp_path, max_epochs=epochs, callbacks=callbacks, logger=logger, **kwargs).fit(
            network(), datamodule=data
        )
    return watch.seen


def test_training_goes_on_as_if_nobody_had_looked(volume, tmp_path, quiet_lightning, no_threads_left):
    without = fit(volume, tmp_path / "a", None)
    for split in ("train", "val"):
        seen = fit(volume, tmp_path / split, BatchPreview(split=split))
        for (weights, state, modes), (others, other_state, other_modes) in zip(without, seen, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
            assert torch.equal(state, other_state)
            assert modes == other_modes
        files = sorted(p.name for p in (tmp_path / split / "previews").iterdir())
        assert files == [f"{split}-epoch0000.png", f"{split}-epoch0001.png"]


def test_every_k_epochs_into_the_folder_of_the_csv_logger(volume, tmp_path, quiet_lightning):
    logger = CSVLogger(tmp_path, name="", version="")
    fit(volume, tmp_path, BatchPreview(every_n_epochs=2, samples=1), logger, epochs=3)
    assert sorted(p.name for p in (tmp_path / "previews").iterdir()) == ["train-epoch0000.png", "train-epoch0002.png"]
    fit(volume, tmp_path / "never", BatchPreview(every_n_epochs=0), epochs=1)
    assert not (tmp_path / "never" / "previews").exists()


def test_what_is_drawn_is_the_batch_of_the_step(volume, tmp_path, quiet_lightning, monkeypatch):
    """Samples, their transforms and predictions, as they reach the sheet; the sheet is drawn too."""
    from cellmap_lightning.callbacks import preview

    drawn, real = [], preview.contact_sheet
    monkeypatch.setattr(
        preview, "contact_sheet", lambda samples, *a, **k: drawn.append(samples) or real(samples, *a, **k)
    )
    watch = Watch()
    with module(volume, spatial_transforms=AUGMENTED["spatial_transforms"]) as data:
        made = network()
        trainer(
            tmp_path, max_epochs=2, limit_val_batches=0, callbacks=[watch, BatchPreview()], limit_train_batches=2
        ).fit(made, datamodule=data)
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


def test_wrong_settings_are_refused_and_models_are_not(volume, tmp_path, quiet_lightning, caplog):
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


def test_the_real_volume_has_outlines_on_its_membranes(real_volume, tmp_path):
    """Membranes are dark: where the target says so, raw is darker than beside it, in each sample as it is shown."""
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
