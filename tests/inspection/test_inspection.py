"""The report of cellmap-inspect, compared with the data."""

import csv
import fcntl
import io
import json
import os
import shutil
import struct
import termios
import time
from pathlib import Path

import hydra
import numpy as np
import pytest
import zarr
from hydra.utils import instantiate
from omegaconf import OmegaConf

from cellmap_lightning.commands.resolvers import CONFIGS, register_resolvers
from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.inspection.cached_files import clear, listing, measurements, regions
from cellmap_lightning.inspection.facts import read_crop_facts, read_volume_facts
from cellmap_lightning.inspection.problems import find_problems
from cellmap_lightning.inspection.proposal import propose
from cellmap_lightning.inspection.report import inspect, refuse
from cellmap_lightning.inspection.scale_facts import at_scale
from cellmap_lightning.io.writer import ArrayOptions, write_multiscale
from cellmap_lightning.splits.datasplit import for_all
from cellmap_lightning.splits.entries import CropRecord
from cellmap_lightning.splits.manifests import GROUNDTRUTH, RAW
from tests.commands.test_cli import run_forked
from tests.conftest import CLASSES, INPUTS, TARGETS
from tests.geometries import write_challenge, write_image, write_label

MANIFEST = Path(__file__).parents[3] / "shared" / "data" / "challenge" / "train_crop_manifest.csv"


@pytest.fixture(scope="module")
def report(volume):
    return inspect({"csv_path": volume.csv_path}, {}, None)


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """Use a cache folder that no other test has written to."""
    monkeypatch.setenv("CELLMAP_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


# -- facts


def test_facts_match_the_stored_data(report, volume):
    (raw,) = report.volumes
    assert raw.path == volume.raw_path
    for level in raw.levels:
        array = zarr.open_array(f"{raw.path}/{level.name}", mode="r")
        assert level.shape == array.shape
        assert level.chunks == array.chunks
        assert level.dtype == str(array.dtype)
    assert {crop.name for crop in report.crops} == {f"volume/{name}" for name in volume.crops}
    for crop in report.crops:
        name = crop.name.split("/")[1]
        assert set(crop.classes) == set(volume.annotated[name])
        assert crop.usage == {"validate": "val"}.get(volume.usage[name], volume.usage[name])
        for label, facts in crop.classes.items():
            stored = zarr.open_array(f"{volume.label_path(name, label)}/s0", mode="r")[...]
            if facts.voxels is not None and facts.unknown is not None and label not in ("mito", "ves", "nuc"):
                assert facts.voxels == np.count_nonzero((stored != 0) & (stored != 255))
                assert facts.unknown == pytest.approx((stored == 255).mean())
    assert any(crop.absent for crop in report.crops)
    # Labels are half as large as raw's voxels, with other corners: half a voxel of raw at most.
    assert all(crop.ratio == pytest.approx((0.5, 0.5, 0.5)) for crop in report.crops)
    assert all(abs(part) in (0, 0.5) for crop in report.crops for part in np.round(crop.off, 6))


def test_codecs_shards_and_formats(tmp_path):
    data = np.zeros((16, 16, 16), np.uint8)
    for name, more, expected in (
        ("plain", {"compressor": None}, ("none", (8, 8, 8))),
        ("v2", {}, ("blosc-zstd", (8, 8, 8))),
        ("v3", {"zarr_format": 3}, ("blosc-zstd", (8, 8, 8))),
        ("shards", {"zarr_format": 3, "shards": (16, 16, 16)}, ("blosc-zstd", (16, 16, 16))),
    ):
        write_multiscale(
            tmp_path / name,
            data,
            scale=(8, 8, 8),
            translation=(0, 0, 0),
            storage=ArrayOptions(chunks=(8, 8, 8), **more),
        )
        (facts,) = read_volume_facts([str(tmp_path / name)], False)
        codec, files = expected
        assert facts.levels[0].chunks == (8, 8, 8)
        assert facts.levels[0].files == files
        assert facts.levels[0].codec == codec


@pytest.fixture
def crops_with_problems(tmp_path):
    """Write a raw volume of 8 nm with one chunk missing, and a crop for each problem."""
    base = tmp_path / "jrc_a" / "jrc_a.zarr"
    raw = base / RAW
    write_image(raw, [8, 8, 8], [0, 0, 0], [64, 64, 64], levels=2, chunks=32)
    for index in np.ndindex(2, 2, 2):
        if index != (1, 1, 1):
            path = raw / "s0" / Path(*map(str, index))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"\0")
    crops = {
        "crop1": ([4, 4, 4], [-2, -2, -2], [64, 64, 64]),  # aligned, in the first chunk
        "crop2": ([4, 4, 4], [256 - 1, 254, 254], [60, 60, 60]),  # off by 1 nm in z, on the chunk that is missing
        "crop3": ([4, 4, 4], [-2, -2, -2], [8, 64, 64]),  # thin
        "crop4": ([32, 32, 32], [12, 12, 12], [8, 8, 8]),  # coarse
        "crop5": ([8, 8, 8], [460, 0, 0], [16, 16, 16]),  # half outside
    }
    entries = []
    for name, (scale, origin, shape) in crops.items():
        size = int(np.prod(shape))
        write_label(
            base / GROUNDTRUTH / name / "mito", scale, origin, shape, size // 4, size * 3 // 4 * (name == "crop1")
        )
        write_label(base / GROUNDTRUTH / name / "er", scale, origin, shape, size // 8 * (name == "crop1"))
        write_label(base / GROUNDTRUTH / name / "ld", scale, origin, shape, 0)
        entries.append(("train", CropRecord(name, str(raw), f"{base / GROUNDTRUTH / name}/[mito,er,ld]")))
    return str(raw), entries, base


def kinds(problems):
    return {(p.kind, p.where.removeprefix("jrc_a/")) for p in problems}


def test_each_problem_is_reported_and_no_other(crops_with_problems):
    raw, entries, _ = crops_with_problems
    volumes, crops = read_volume_facts([raw], False), at_scale(read_crop_facts(entries), (8.0, 8.0, 8.0), False)
    problems = find_problems(volumes, crops, ["mito", "er", "ld"], (8, 8, 8), [16, 16, 16], True)
    assert kinds(problems) == {
        ("outside", "crop5"), ("raw absent", "crop2"), ("labels coarse", "crop4"), ("small", "crop3"),
        ("off lattice", "crop5"), ("rare", "er"), ("empty", "ld"),
        ("validation", "crop1, jrc_a/crop2, jrc_a/crop3 and 2 more"),
    }  # fmt: skip
    assert [crop.chunks for crop in crops] == [(0, 1), (1, 1), (0, 1), None, (0, 1)]
    texts = {(p.kind, p.where): p.text for p in problems}
    assert (
        texts["labels coarse", "jrc_a/crop4"]
        == "32 x 32 x 32 nm at their finest, for 8 x 8 x 8 nm: the crop is left out"
    )
    assert "4 x 32 x 32 voxels, less than the patch along z" in texts["small", "jrc_a/crop3"]
    assert crops[4].outside == pytest.approx(1 - (516 - 8 / 2 - 456 + 4 - 4) / 128, abs=0.1)
    mostly = find_problems(volumes, crops[:1], ["mito"], None, None, True)
    assert ("unknown", "crop1") not in kinds(mostly)  # a quarter of a quarter as a mean


def test_unreadable_crops_and_missing_levels_are_named(crops_with_problems):
    raw, entries, base = crops_with_problems
    (base / GROUNDTRUTH / "crop1" / "mito" / "s1" / ".zarray").unlink()
    (base / GROUNDTRUTH / "crop2" / "er" / ".zattrs").write_text("{")
    gone = ("train", CropRecord("line 9", raw, f"{base / GROUNDTRUTH}/crop9/[mito]"))
    crops = read_crop_facts([*entries, gone])
    problems = find_problems(read_volume_facts([raw, raw + "x"], False), crops, ["mito"], None, None, True)
    assert {("missing level", "crop1"), ("unreadable", "crop2"), ("unreadable", "crop9")} <= kinds(problems)
    assert any("did you mean 'fibsem-uint8'" in p.text for p in problems)
    assert any("'crop9'" in p.text for p in problems)


@pytest.mark.parametrize(
    ("gone", "texts"),
    [
        (["s0"], ["s0, not on disk; the coarser level s1 ([16.0, 16.0, 16.0] nm) is read instead, upsampled"]),
        (["s1"], ["s1, not on disk; the finer level s0 ([8.0, 8.0, 8.0] nm) is read instead"]),
        (["s1", "s2"], ["s1, s2, not on disk; the finer level s0 ([8.0, 8.0, 8.0] nm) is read instead"]),
        (
            ["s0", "s2"],
            [
                "s0, not on disk; the coarser level s1 ([16.0, 16.0, 16.0] nm) is read instead, upsampled",
                "s2, not on disk; the finer level s1 ([16.0, 16.0, 16.0] nm) is read instead",
            ],
        ),
    ],
)
def test_the_level_read_in_place_of_a_missing_one_is_named(tmp_path, gone, texts):
    raw = tmp_path / "raw"
    write_multiscale(raw, np.ones((16, 16, 16), np.uint8), scale=(8, 8, 8), translation=(0, 0, 0), levels=3)
    for name in gone:
        shutil.rmtree(raw / name)
    problems = find_problems(read_volume_facts([str(raw)], False), [], [], None, None, True)
    assert [p.text for p in problems if p.kind == "missing level"] == [f"raw lists {text}" for text in texts]


def test_foreground_lost_at_coarser_levels_is_counted_with_deep(tmp_path, empty_cache):
    thin = np.zeros((32, 32, 32), np.uint8)
    thin[:, :, 5] = 1  # a sheet of one voxel, which the mode of eight voxels loses
    solid = np.zeros((32, 32, 32), np.uint8)
    solid[8:24, 8:24, 8:24] = 1
    for name, data in (("pm", thin), ("mito", solid)):
        write_multiscale(tmp_path / "crop1" / name, data, scale=(4, 4, 4), translation=(0, 0, 0), levels=2, mode="mode")
    write_multiscale(tmp_path / "raw", np.full((16, 16, 16), 7, np.uint8), scale=(8, 8, 8), translation=(2, 2, 2))
    entries = [("train", CropRecord("x", str(tmp_path / "raw"), f"{tmp_path / 'crop1'}/[pm,mito]"))]
    crops = read_crop_facts(entries)
    assert [c.voxels for c in crops[0].classes.values()] == [None, None]
    (shallow,), (deep,) = (at_scale(crops, (8.0, 8.0, 8.0), look) for look in (False, True))
    assert [c.lost for c in shallow.classes.values()] == [None, None]
    assert {n: (c.voxels, c.lost, c.level) for n, c in deep.classes.items()} == {
        "pm": (1024, 1.0, "s1"), "mito": (4096, 0.0, "s1"),
    }  # fmt: skip
    (problem,) = (p for p in find_problems([], [deep], ["pm", "mito"], None, None, True) if p.kind == "lost")
    assert problem.text.startswith("pm 100% at s1; label_downsample=any")
    # Counts are cached, so that they are known later without reading.
    (again,) = read_crop_facts(entries)
    assert [c.voxels for c in again.classes.values()] == [1024, 4096]


def test_contrast_and_polarity_of_volumes(tmp_path, empty_cache):
    rng = np.random.default_rng(0)
    membranes = 200 - 120 * (rng.random((32, 64, 64)) < 0.15) + rng.normal(0, 8, (32, 64, 64))
    for name, values in (("a", membranes), ("b", membranes), ("c", 255 - membranes), ("d", 100 + membranes / 10)):
        write_multiscale(tmp_path / name, values.clip(1, 255).astype(np.uint8), scale=(8, 8, 8), translation=(0, 0, 0))
    paths = [str(tmp_path / name) for name in "abcd"]
    assert all(v.values is None for v in read_volume_facts(paths, False))
    volumes = read_volume_facts(paths, True)
    for volume, path in zip(volumes, paths, strict=True):
        stored = zarr.open_array(f"{path}/s0", mode="r")[...]
        low, median, high = np.percentile(stored, [0.5, 50, 99.5])
        assert (volume.values.low, volume.values.median, volume.values.high) == pytest.approx(
            (low, median, high), abs=1
        )
        assert sum(volume.values.histogram) == pytest.approx(1)
        edges = np.linspace(volume.values.low, volume.values.high, len(volume.values.histogram) + 1)
        inside = stored[(stored > edges[0]) & (stored <= edges[-1])]
        bars = np.diff([(inside <= edge).mean() for edge in edges])
        assert np.allclose(volume.values.histogram, bars, atol=0.02)
        assert len(edges) - 1 <= volume.values.high - volume.values.low  # no gaps between whole numbers
    problems = find_problems(volumes, [], [], None, None, True)
    assert [(p.kind, p.where) for p in problems] == [("contrast", "d"), ("polarity", "c")]
    assert read_volume_facts(paths, False)[0].values == volumes[0].values  # cached


# -- costs and proposal


def test_costs_match_the_batches(volume):
    from cellmap_lightning import CellMapDataModule

    settings = {
        "csv_path": volume.csv_path, "classes": CLASSES, "input_arrays": INPUTS, "target_arrays": TARGETS,
        "batch_size": 3,
    }  # fmt: skip
    patch = {"shape": [8, 16, 24], "scale": [10.48, 8, 8]}
    report = inspect(settings, patch, None)
    assert report.complete
    assert report.refused is None
    with CellMapDataModule(**settings) as data:
        batch = next(iter(data.train_dataloader()))
        assert report.costs.finished == {name: batch[name].nbytes for name in ("raw", "labels")}
        assert report.costs.samples["train"] == len(data.train_dataset)
        assert report.costs.crops == {"train": len(data.train_dataset.datasets), "val": len(data.val_dataset.datasets)}
        drawn = data.train_dataset.strategy.class_chances
    if report.costs.frequencies is None:  # one crop of the volume has no counts
        assert "deep=true" in report.costs.unknown
        report = inspect(settings, patch, None, deep=True)
    assert [pair[0] for pair in report.costs.frequencies.values()] == pytest.approx(list(drawn))
    assert "patch shows it" in inspect(settings, patch, None, deep=True).costs.shown


@pytest.mark.parametrize(("settings_of_cache", "room"), [({}, 2 << 30), ({"cache_bytes": 5_000_000}, 5_000_000)])
def test_costs_of_chunks_in_memory_are_their_limit(volume, settings_of_cache, room):
    settings = {"csv_path": volume.csv_path, "classes": CLASSES, "input_arrays": INPUTS, "target_arrays": TARGETS}
    costs = inspect(
        settings | {"cache": "chunks"} | settings_of_cache, {"shape": [8, 16, 24], "scale": [10.48, 8, 8]}, None
    ).costs
    assert (costs.cache_room, costs.cache_where) == (room, "memory")


def test_proposal_is_a_configuration_that_runs(report, tmp_path):
    register_resolvers()
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(report.proposal.yaml)
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = hydra.compose("train", overrides=[f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine"])
    assert list(cfg.patch.shape) == list(report.proposal.shape)
    assert list(cfg.data.input_arrays.raw.scale) == list(report.proposal.scale)
    with instantiate(OmegaConf.to_container(cfg.data, resolve=True), _convert_="all") as data:
        data.setup("fit")
        sample = data.train_dataset[0]
        assert sample["labels"].shape == (len(report.proposal.classes), *report.proposal.shape)
    held = {name: sum(name in crop.held for crop in report.crops) for name in report.proposal.classes}
    assert min(held.values()) >= 2
    for name in ("scale", "shape", "batch_size", "normalize", "classes"):
        assert report.proposal.reasons[name].split(";")[0][:40] in report.proposal.yaml.replace("\n  # ", " ")


def test_proposal_follows_from_the_crops(crops_with_problems):
    raw, entries, base = crops_with_problems
    volumes, crops = read_volume_facts([raw], False), read_crop_facts(entries)
    nothing = {"scale": None, "shape": None, "classes": None}
    one = propose(volumes, crops, {}, 16 << 30, nothing, 2.0)
    assert one.scale == (8, 8, 8)  # four of five crops
    assert "4 of 5" in one.reasons["scale"]
    assert one.shape == (16, 16, 16)  # the smallest have 16, apart from z: the median is 23 there, and the smallest 4
    assert "along z only half of the crops" in one.reasons["shape"]
    assert one.reasons["shape"].endswith("smaller crops: jrc_a/crop3 (4x32x32)")
    assert one.reasons["scale"].endswith("coarser in jrc_a/crop4")
    assert one.classes == ("mito",)
    assert "er (1), ld (0)" in one.reasons["classes"]
    assert one.normalize == "dtype"
    # Less memory, smaller batches; chosen settings are not changed.
    small = propose(volumes, crops, {}, 1 << 26, nothing, 2.0)
    assert np.prod(small.shape) * small.batch_size < np.prod(one.shape) * one.batch_size
    chosen = propose(volumes, crops, {}, 16 << 30, {"scale": [16, 16, 16], "shape": [8, 8, 8], "classes": ["ld"]}, 2.0)
    assert (chosen.scale, chosen.shape, chosen.classes) == ((16, 16, 16), (8, 8, 8), ("ld",))
    # Raw that is too coarse for the scale would be refused.
    write_image(base.parents[1] / "jrc_b.zarr" / RAW, [64, 64, 64], [0, 0, 0], [64, 64, 64])
    coarse = str(base.parents[1] / "jrc_b.zarr" / RAW)
    both = read_volume_facts([raw, coarse], False)
    more = read_crop_facts([*entries, ("train", CropRecord("b", coarse, entries[0][1].target_path))])
    assert propose(both, more, {}, 16 << 30, nothing, 2.0).scale == (64, 64, 64)  # the only one for five of six
    nothing["scale"] = [8, 8, 8]
    assert propose(both, more, {}, 16 << 30, nothing, 2.0).only_datasets == ("jrc_a",)
    assert propose([], [], {}, 16 << 30, nothing, 2.0) is None


def test_volume_with_and_without_its_crops(volume, crops_with_problems):
    alone = inspect({}, {}, volume.raw_path)
    assert {crop.name for crop in alone.crops} == {f"volume/{name}" for name in volume.crops}
    assert all("all" not in crop.classes for crop in alone.crops)
    (crops_with_problems[2] / GROUNDTRUTH).rename(crops_with_problems[2] / "elsewhere")
    bare = inspect({}, {}, crops_with_problems[0])
    assert not bare.crops
    assert bare.proposal.scale == (8, 8, 8)
    assert bare.costs.crops == {"predict": 1}
    assert "No problems" in str(bare)


def test_report_as_json_and_as_text(report, volume):
    document = json.loads(report.json())
    assert {"versions", "system", "volumes", "crops", "problems", "proposal", "costs"} <= set(document)
    assert len(document["crops"]) == len(volume.crops)
    text = str(report)
    for part in ("Raw volumes (1)", f"Crops ({len(volume.crops)})", "Classes", "Proposal", "scale:", *volume.crops):
        assert part in text


def test_invalid_configuration_is_refused_after_the_report(volume):
    one = inspect({"csv_path": volume.csv_path}, {"scale": [1, 1, 1]}, None)
    assert any(p.kind == "config" for p in one.problems)
    assert "the configuration is refused" in str(one)
    with pytest.raises(CellMapValueError, match="finer along z"):
        refuse(one)


# -- cached files


def test_listing_and_clear_leave_other_files(volume, empty_cache):
    from cellmap_lightning import CellMapDataModule

    assert "no measurements are cached" in listing()
    settings = {
        "csv_path": volume.csv_path, "classes": CLASSES, "input_arrays": INPUTS, "target_arrays": TARGETS,
        "cache": "disk",
    }  # fmt: skip
    other_file, note = empty_cache / "regions-of-mine.txt", empty_cache / "note.json"
    with CellMapDataModule(**settings) as data:
        next(iter(data.train_dataloader()))
        other_file.write_text("mine")
        note.write_text("{}")
        (empty_cache / ("0" * 32 + ".json")).symlink_to(note)
        data.train_dataset.crops[0].foreground_index("mito")
        assert measurements()
        assert all(Path(one.of).exists() for one in measurements())
        text = listing()
        assert "volume/crop" in text
        crop = data.train_dataset.datasets[0].label.split("/")[1]
        assert str(Path(volume.label_path(crop, "mito")).resolve()) in text
        live = {one.path for one in regions()}
        assert "are in use" in clear()
        assert {one.path for one in regions()} & live
        assert not measurements()
        next(iter(data.train_dataloader()))  # regions in use are not removed
    clear()
    assert not regions()
    assert not measurements()
    assert other_file.read_text() == "mine"
    assert note.exists()
    assert (empty_cache / ("0" * 32 + ".json")).is_symlink()
    assert clear() == "nothing is cached"


# -- the command


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "give the data in one way: data.csv_path=..."),
        (["data.csv_path=a.csv", "data.input_path=b.zarr"], "got data.csv_path and data.input_path"),
        (["data.csv_path=nowhere.csv"], "the CSV of crops nowhere.csv does not exist"),
        (["cache=lst"], "cache must be one of list, clear, got 'lst'; did you mean 'list'?"),
        (["data.csvpath=x.csv"], "did you mean 'data.csv_path'?"),
        (["deep=maybe"], "deep must be true or false, got 'maybe'"),
        (["device_gb=-1"], "device_gb (GiB) must be a number above 0, got -1"),
    ],
    ids=lambda a: (a[0] if a else "nothing") if isinstance(a, list) else "",
)
def test_invalid_arguments_are_one_line_errors(tmp_path, arguments, expected):
    code, text = run_forked(*arguments, cwd=tmp_path, command="inspect")
    assert code == 1
    assert expected in text
    assert "Traceback" not in text


def test_command_prints_one_json_document(volume, tmp_path):
    code, text = run_forked(f"data.csv_path={volume.csv_path}", "json=true", cwd=tmp_path, command="inspect")
    assert code == 0, text
    assert json.loads(text)["versions"]["zarr"] == zarr.__version__  # and no progress bar, outside of a terminal
    assert [path.name for path in tmp_path.iterdir()] == ["stderr.txt"], "no other file is written"
    code, text = run_forked(f"data.csv_path={volume.csv_path}", "patch.scale=[1,1,1]", cwd=tmp_path, command="inspect")
    assert code == 1
    assert text.index("Proposal") < text.index("finer along z")


def test_progress_bars_only_on_terminals(monkeypatch, capfd):
    def work(n):
        time.sleep(0.4)
        return n

    items = list(range(32))
    assert for_all(work, items, "looking") == items
    assert capfd.readouterr() == ("", "")
    leader, follower = os.openpty()
    os.set_blocking(leader, False)
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    with os.fdopen(follower, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        for_all(work, items, "looking", "volume")
        shown = os.read(leader, 100_000).decode()
    os.close(leader)
    assert "looking:" in shown
    assert "/32 [" in shown
    assert "volume/s" in shown
    assert "<" in shown  # time that is left


# -- the challenge


def challenge():
    report = {}
    for row in csv.DictReader(io.StringIO(MANIFEST.read_text())):
        values = [[float(n) for n in row[k].strip("[]").split(";")] for k in ("voxel_size", "translation", "shape")]
        key = row["dataset"], f"crop{row['crop_name']}"
        report.setdefault(key, (values[0], values[1], [int(n) for n in values[2]], []))[3].append(row["class_label"])
    return report


@pytest.mark.slow
@pytest.mark.skipif(not MANIFEST.exists(), reason="the challenge's manifest is missing")
def test_crops_of_the_challenge_take_seconds(tmp_path):
    """289 crops with up to 48 classes each, nearly 12,000 label images: metadata alone."""
    crops = challenge()
    write_challenge(tmp_path, crops)
    began = time.process_time()
    report = inspect({"search_path": str(tmp_path)}, {}, None)
    spent = time.process_time() - began
    assert len(report.crops) == 289
    assert report.proposal.scale == (8, 8, 8)
    assert report.refused is None
    assert report.costs.splits["train"] > 200
    assert sum(len(crop.classes) for crop in report.crops) == sum(len(crop[-1]) for crop in crops.values())
    assert spent < 200, spent  # of a processor, about 20 s on the machine that this was written on


def test_real_volume(real_volume):
    one = inspect({}, {}, str(real_volume / RAW), deep=True)
    assert [crop.name for crop in one.crops] == ["vnc/crop1", "vnc/crop2"]
    # Three sections of the annotation are empty.
    assert {(problem.kind, problem.where) for problem in one.problems} == {("gaps", "vnc/crop1"), ("gaps", "vnc/crop2")}
    assert all("section 1 (z 25..75 nm), 7 (z 325..375 nm), 18 (z 875..925 nm)" in p.text for p in one.problems)
    assert one.proposal.scale == (50, 4.6, 4.6)
    assert one.proposal.shape == (16, 128, 128)
    assert set(one.proposal.classes) == {"mito", "membrane", "synapse", "ecs"}
    assert one.volumes[0].values.skew < 0  # membranes are dark
