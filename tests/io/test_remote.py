"""Data behind addresses: read as from a folder, over S3, HTTP and from a zip file, with few requests."""

import logging
import re
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from cellmap_lightning import CellMapDataLoader, CellMapDataModule, CellMapDataset
from cellmap_lightning.crops.options import IntensityOptions, ReadOptions
from cellmap_lightning.errors import CellMapError, CellMapFileNotFoundError, CellMapValueError
from cellmap_lightning.io.ngff import read_multiscale
from cellmap_lightning.io.store import metadata_cache, parse_location
from cellmap_lightning.splits.datasplit import CellMapDataSplit
from tests.foreign import SEMANTIC, annotated, cube, sample, write_pair
from tests.io.faults import serving
from tests.make import make_dataset

pytestmark = pytest.mark.usefixtures("no_threads_left")

CLASSES = ["mito", "er", "pm"]
SPEC = {"shape": [8, 16, 24], "scale": [10.48, 8, 8]}
CROPS = {"crop1": "mito,er", "crop2": "mito,er,pm"}
KEY, SECRET = "AKIAEXAMPLE12345", "wJalrXUtnFEMIexampleSECRETkey"


def arguments(root, crop="crop2", **kwargs):
    target = f"{root}/recon-1/labels/groundtruth/{crop}/[{CROPS[crop]}]"
    given = {"cache": "none"} | kwargs
    return f"{root}/recon-1/em/fibsem-uint8", target, CLASSES, {"raw": SPEC}, {"labels": SPEC}, given


def samples_of(root, positions=(0, 7, -1), **kwargs):
    *given, more = arguments(root, **kwargs)
    with make_dataset(*given, **more) as dataset:
        return [dataset[n % len(dataset)] for n in positions]


def same(a, b):
    return all(
        torch.equal(x[name].nan_to_num(-1), y[name].nan_to_num(-1)) for x, y in zip(a, b, strict=True) for name in x
    )


@pytest.fixture(scope="module")
def sharded(volume, tmp_path_factory):
    """The same raw and labels in Zarr v3 with shards, at the same relative paths."""
    import zarr

    from cellmap_lightning.io.writer import ArrayOptions, write_multiscale

    root = tmp_path_factory.mktemp("sharded") / "volume.zarr"
    groups = ["recon-1/em/fibsem-uint8", *(f"recon-1/labels/groundtruth/crop2/{c}" for c in CLASSES)]
    for group in groups:
        level = read_multiscale(Path(volume.path) / group).finest
        values = zarr.open_array(str(level.path), mode="r")[...]
        storage = ArrayOptions(chunks=(16, 16, 16), shards=(32, 64, 64), zarr_format=3)
        levels = 2 if group.startswith("recon-1/em") else 3
        mode = "mean" if group.startswith("recon-1/em") else "mode"
        attributes = {"cellmap": read_multiscale(Path(volume.path) / group).attributes.get("cellmap", {})}
        write_multiscale(root / group, values, scale=level.scale, translation=level.translation, levels=levels,
                         mode=mode, attributes=attributes, storage=storage)  # fmt: skip
    return root


@pytest.fixture(scope="module")
def endpoint():
    """Start moto's server on loopback, in a separate process."""
    pytest.importorskip("moto")
    pytest.importorskip("s3fs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(300):
                assert process.poll() is None
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/moto-api/", timeout=1).close()
                    break
                except OSError:
                    time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


@pytest.fixture(scope="module")
def bucket(endpoint, volume, sharded):
    """A bucket with both volumes, open to everybody; and its twin that requires a signature."""
    import s3fs

    fs = s3fs.S3FileSystem(
        key=KEY, secret=SECRET, endpoint_url=endpoint, skip_instance_cache=True,
        config_kwargs={"max_pool_connections": 32},
    )  # fmt: skip
    fs.mkdir("open", acl="public-read")
    folders = ["recon-1/em/fibsem-uint8", *(f"recon-1/labels/groundtruth/{crop}" for crop in CROPS)]
    for root, name in ((Path(volume.path), "v2.zarr"), (sharded, "v3.zarr")):
        for folder in folders:
            files = [p for p in (root / folder).rglob("*") if p.is_file()]
            targets = [f"open/{name}/{p.relative_to(root)}" for p in files]
            if files:
                fs.put([str(p) for p in files], targets, ACL="public-read")
    return "s3://open"


def signed(endpoint):
    return {"key": KEY, "secret": SECRET, "endpoint_url": endpoint}


def anonymous(endpoint):
    return {"anon": True, "endpoint_url": endpoint}


@pytest.mark.parametrize("how", [signed, anonymous])
def test_s3_is_read_as_a_folder(bucket, endpoint, volume, sharded, how):
    for name, root in (("v2.zarr", volume.path), ("v3.zarr", sharded)):
        assert same(samples_of(f"{bucket}/{name}", storage_options=how(endpoint)), samples_of(root))


def test_http_is_read_as_a_folder_and_never_listed(volume, sharded):
    for root in (volume.path, sharded):
        with serving(Path(root)) as (url, asked):
            assert same(samples_of(url), samples_of(root))
        assert all(
            Path(path).name.startswith((".z", "zarr.json")) or re.fullmatch(r"(c\.)?[\d.]+", path.rpartition("/")[2])
            for path in asked
        )


def test_a_server_without_ranges_is_named(sharded):
    with serving(sharded, fault="no ranges") as (url, _), pytest.raises(CellMapError, match="byte ranges"):
        samples_of(url, read_attempts=1)


def test_a_zip_file(volume, tmp_path):
    root = Path(volume.path)
    file = tmp_path / "volume.zip"
    with zipfile.ZipFile(file, "w") as archive:
        for path in root.rglob("*"):
            if path.is_file() and ("crop2" in path.parts or "em" in path.parts):
                archive.write(path, path.relative_to(root))
    *given, more = arguments(f"zip://::{file}")
    raw, target = (part.replace(f"zip://::{file}/", "zip://") + f"::{file}" for part in given[:2])
    with make_dataset(raw, target, *given[2:], **more) as dataset:
        assert dataset.label.endswith("crop2")
        assert same([dataset[3]], samples_of(root, (3,)))


def test_the_error_for_a_missing_zip_member_has_its_name(volume, tmp_path):
    file = tmp_path / "volume.zip"
    root = Path(volume.path)
    with zipfile.ZipFile(file, "w") as archive:
        for path in (root / "recon-1" / "em").rglob("*"):
            if path.is_file():
                archive.write(path, Path("v.zarr") / path.relative_to(root))
    spec = {"raw": SPEC}
    for inside, expected_text in (
        ("v.zar/recon-1/em/fibsem-uint8", f"{file} has no 'v.zar'; did you mean 'v.zarr'?"),
        ("v.zarr/recon-1/em/fibsem-uint", f"zip://v.zarr/recon-1/em::{file} has no 'fibsem-uint'; did you mean 'fibs"),
        ("nothing", f"{file} has no 'nothing'; it has v.zarr"),
    ):
        with pytest.raises(CellMapFileNotFoundError) as caught:
            CellMapDataset(f"zip://{inside}::{file}", input_arrays=spec, read=ReadOptions(cache="none"))
        assert f"zip://{inside}::{file} does not exist: {expected_text}" in str(caught.value)
    with pytest.raises(CellMapError, match=r"volum\.zip"):
        CellMapDataset(
            f"zip://v.zarr/recon-1/em/fibsem-uint8::{tmp_path}/volum.zip",
            input_arrays=spec,
            read=ReadOptions(cache="none"),
        )


@pytest.mark.parametrize("root", ["v2.zarr", pytest.param("v3.zarr", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "method", ["forkserver", *(pytest.param(m, marks=pytest.mark.slow) for m in ("fork", "spawn"))]
)
@pytest.mark.parametrize("how", [anonymous, pytest.param(signed, marks=pytest.mark.slow)])
def test_from_worker_processes(bucket, endpoint, volume, sharded, root, method, how):
    *given, more = arguments(f"{bucket}/{root}", storage_options=how(endpoint))
    with make_dataset(*given, **more) as dataset:
        _ = dataset[0]  # arrays opened by the parent are opened again by its children
        here = list(CellMapDataLoader(dataset, 2, is_train=False, samples_per_epoch=6))
        loader = CellMapDataLoader(
            dataset, 2, num_workers=2, is_train=False, samples_per_epoch=6, multiprocessing_context=method, timeout=120
        )
        assert same(list(loader), here)
        loader.close()


def test_workers_of_a_remote_volume_are_not_forked_by_default(bucket, endpoint, volume):
    *given, more = arguments(f"{bucket}/v2.zarr", storage_options=anonymous(endpoint))
    with make_dataset(*given, **more) as dataset:
        assert CellMapDataLoader(dataset, num_workers=1).multiprocessing_context.get_start_method() == "forkserver"
        assert dataset.max_workers == 32
    *given, more = arguments(volume.path)
    with make_dataset(*given, **more) as dataset:
        assert CellMapDataLoader(dataset, num_workers=1).multiprocessing_context is None


def test_many_threads_read_at_once(bucket, endpoint, volume):
    *given, more = arguments(f"{bucket}/v2.zarr", storage_options=anonymous(endpoint))
    with make_dataset(*given, **more) as dataset, ThreadPoolExecutor(8) as pool:
        assert same(list(pool.map(dataset.__getitem__, range(24))), samples_of(volume.path, range(24)))


def test_tensorstore_reads_s3_and_http(bucket, endpoint, volume):
    pytest.importorskip("tensorstore")
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from tests.io.test_remote import same, samples_of
assert same(samples_of("s3://open/v2.zarr", reader="tensorstore", storage_options={anonymous(endpoint)!r}),
            samples_of({str(volume.path)!r}))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], check=False, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    with pytest.raises(CellMapValueError, match=r"storage_options has .*'key'.*use reader='zarr'"):
        samples_of(f"{bucket}/v2.zarr", reader="tensorstore", storage_options=signed(endpoint))


def test_a_second_epoch_requests_nothing(volume, tmp_path, monkeypatch):
    monkeypatch.setenv("CELLMAP_CACHE_DIR", str(tmp_path))
    with serving(Path(volume.path)) as (url, asked):
        for again in (False, True):
            *given, more = arguments(url, cache="disk")
            with make_dataset(*given, **more) as dataset:
                loader = CellMapDataLoader(dataset, 2, is_train=False)
                before = dict(asked)
                first = list(loader)
                chunks = {path for path in asked if path.rpartition("/")[2].isdigit()}
                read = any(asked[path] > before.get(path, 0) for path in chunks)
                assert read != again, "a later run finds the voxels of this one"
                before = sum(asked.values())
                assert same(list(loader), first)
                assert sum(asked.values()) == before
        assert chunks
        # Each is read once; of each array two at most are looked for when it is opened, in both runs.
        often = [path for path in chunks if asked[path] != 1]
        assert all(asked[path] <= 3 for path in often)
        assert len(often) <= 2 * len({path.rpartition("/s")[0] for path in chunks})


def test_opening_many_crops_waits_for_few_requests(volume):
    latency, copies = 0.05, 24
    root = f"{{}}/recon-1/labels/groundtruth/crop2/[{CROPS['crop2']}]"
    with serving(Path(volume.path), latency=latency) as (url, asked):
        raw = f"{url}/recon-1/em/fibsem-uint8"
        entries = {"train": [{"raw": raw, "gt": root.format(url)}] * copies}
        split = CellMapDataSplit(
            datasets=entries,
            classes=CLASSES,
            input_arrays={"raw": SPEC},
            target_arrays={"labels": SPEC},
            read=ReadOptions(cache="none"),
        )
        assert len(split["train"].datasets) == copies
        split.close()
        # Crops opened separately would request each file again; here they share the answers.
        assert max(asked.values()) <= 32


def test_missing_objects_are_errors_with_their_address(bucket, endpoint, volume):
    options = anonymous(endpoint)
    for root, message in (
        (f"{bucket}/v3.zar", "did you mean 'v3.zarr'"),
        ("s3://opne/v2.zarr", "s3://opne/v2.zarr"),
    ):
        with pytest.raises(CellMapError, match=message):
            samples_of(root, storage_options=options)
    target = f"{bucket}/v2.zarr/recon-1/labels/groundtruth/crop2/[mito,re]"
    raw = f"{bucket}/v2.zarr/recon-1/em/fibsem-uint8"
    with pytest.raises(CellMapFileNotFoundError, match=r"class 're' is in the bracket .*crop2 has .*er, "):
        CellMapDataset(
            raw, target, ["mito", "re"], {"raw": SPEC}, {"labels": SPEC}, read=ReadOptions(storage_options=options)
        )
    with (
        serving(Path(volume.path)) as (url, _),
        pytest.raises(CellMapFileNotFoundError, match="the server has none of"),
    ):
        samples_of(f"{url}/nowhere")
    with pytest.raises(CellMapError, match=r"127\.0\.0\.1:9"):
        samples_of("http://127.0.0.1:9/v.zarr", read_attempts=1)


def test_credentials_are_nowhere(bucket, endpoint, tmp_path, caplog, monkeypatch):
    """Neither in logs and errors, nor in what a run leaves, checkpoints included."""
    from tests.commands.test_cli import run_forked, small

    caplog.set_level(logging.DEBUG, "cellmap_lightning")
    options = signed(endpoint)
    wrong = options | {"secret": SECRET[::-1]}
    texts = []
    for given in ({"storage_options": options}, {"storage_options": wrong, "crop": "crop1"}):
        try:
            samples_of(f"{bucket}/nowhere.zarr", **given)
        except CellMapError as e:
            texts.append(f"{e} {e!r} {e.__cause__}")
    assert texts
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    root = f"{bucket}/v2.zarr"
    (tmp_path / "crops.csv").write_text(
        "".join(
            f'{usage},{root}/recon-1/em/fibsem-uint8,"{root}/recon-1/labels/groundtruth/{crop}/[{CROPS[crop]}]"\n'
            for usage, crop in (("train", "crop2"), ("validate", "crop1"))
        )
    )
    pairs = ",".join(f"{key}:'{value}'" for key, value in options.items())
    code, errors = run_forked(
        *small(SimpleNamespace(csv_path=tmp_path / "crops.csv")), f"data.storage_options={{{pairs}}}",
        "trainer.max_epochs=1", "hydra.run.dir=out", cwd=tmp_path,
    )  # fmt: skip
    assert code == 0, errors
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert any(p.suffix == ".ckpt" for p in files)
    for file in files:
        assert SECRET.encode() not in file.read_bytes(), file
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert config["data"]["storage_options"]["secret"] == "***"
    assert config["data"]["storage_options"]["endpoint_url"] == endpoint
    for text in (*texts, caplog.text, errors):
        assert SECRET not in text
        assert SECRET[::-1] not in text
    assert SECRET not in repr(parse_location(f"{bucket}/x", options))
    hidden = parse_location("https://me:word@host/x.zarr")
    assert "word" not in str(hidden)
    assert "abc" not in hidden.hide("GET https://host/x?X-Amz-Signature=abc failed")


def test_credentials_in_an_address_are_nowhere(volume, tmp_path, caplog, monkeypatch, capsys):
    """A user and a password over HTTP: in no checkpoint, file of the cache, log line, error or report."""
    from cellmap_lightning.visualization.viewer_links import napari, neuroglancer

    monkeypatch.setenv("CELLMAP_CACHE_DIR", str(tmp_path / "cache"))
    caplog.set_level(logging.DEBUG, "cellmap_lightning")
    with serving(Path(volume.path)) as (url, asked):
        root = url.replace("http://", "http://me:word-17@")
        entry = {"raw": f"{root}/recon-1/em/fibsem-uint8", "gt": f"{root}/recon-1/labels/groundtruth/crop2/[mito,er]"}
        common = {"classes": ["mito", "er"], "input_arrays": {"raw": SPEC}, "target_arrays": {"labels": SPEC}}
        data = {
            "datasets": {"train": [entry]},
            "samples_per_epoch": 2,
            "normalize": {"percentile": [1, 99]},
            "strategy": "foreground",
        }
        with CellMapDataModule(**common, **data) as module:
            assert len(list(module.train_dataloader())) == 2
            state, shown = str(module.state_dict()), f"{module.train_dataset!r} {module.train_dataset.datasets[0]!r}"
        texts = [state, shown, napari(entry["raw"], {}, [0, 0, 0]), neuroglancer(entry["raw"], {}, [0, 0, 0], 8)]
        wrong = [entry | {"gt": entry["gt"].replace("crop2", "crop99")}, entry | {"raw": f"{root}/no"}]
        for bad in (*wrong, {"raw": entry["raw"], "gt": entry["gt"].replace("mito", "no")}, entry | {"nonsense": 1}):
            with (
                pytest.raises(CellMapError) as caught,
                CellMapDataModule(**common, datasets={"train": [bad]}) as module,
            ):
                module.setup("fit")
            texts.append(f"{caught.value} {caught.value!r} {caught.value.__cause__}")
    assert any("fibsem" in str(path) for path in asked), "the volume was read"
    assert "me:" not in capsys.readouterr().out
    for text in (*texts, caplog.text):
        assert "word-17" not in text
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and b"word-17" in p.read_bytes()]


@pytest.fixture
def writer(endpoint):
    """Return a file system that writes to a separate bucket, and remove its objects afterwards."""
    import s3fs

    fs = s3fs.S3FileSystem(**signed(endpoint), skip_instance_cache=True)
    fs.mkdir("rewritten", acl="public-read")
    yield fs
    fs.rm("rewritten", recursive=True)


@pytest.mark.parametrize("how", [anonymous, pytest.param(signed, marks=pytest.mark.slow)])
def test_a_rewritten_volume_on_s3_is_noticed(writer, endpoint, tmp_path, monkeypatch, how):
    from cellmap_lightning.io.writer import ArrayOptions, write_multiscale

    monkeypatch.setenv("CELLMAP_CACHE_DIR", str(tmp_path / "cache"))
    spec = {"raw": {"shape": [8, 8, 8], "scale": [8, 8, 8]}}

    def write(value):
        # The bytes of all metadata stay; only the server's version of them is new.
        folder = tmp_path / str(value)
        data = np.full((8, 8, 8), value, np.uint8)
        write_multiscale(folder, data, scale=(8, 8, 8), translation=(0, 0, 0), storage=ArrayOptions(chunks=(8, 8, 8)))
        files = [p for p in folder.rglob("*") if p.is_file()]
        targets = [f"rewritten/v.zarr/{p.relative_to(folder)}" for p in files]
        writer.put([str(p) for p in files], targets, ACL="public-read")

    def shown():
        with CellMapDataset(
            "s3://rewritten/v.zarr",
            input_arrays=spec,
            is_train=False,
            read=ReadOptions(cache="disk", storage_options=how(endpoint)),
            intensity=IntensityOptions(normalize={"range": [0, 1]}),
        ) as dataset:
            return dataset[0]["raw"].unique().tolist()

    write(3)
    assert shown() == shown() == [3]
    time.sleep(1.1)  # the time that the server sends has seconds; entity tags of equal bytes are equal
    write(5)
    assert shown() == [5]


def test_s3_listings_are_never_stale(writer, endpoint):
    place = parse_location("s3://rewritten/groups", signed(endpoint))
    names = []
    for name in ("a", "b"):
        writer.pipe(f"rewritten/groups/{name}/.zgroup", b"{}")
        names.append(name)
        assert place.children() == names
    assert (place / "b").exists()


def test_one_address_behind_two_endpoints_is_two_places(bucket, endpoint):
    root = f"{bucket}/v2.zarr/recon-1/em/fibsem-uint8/.zattrs"
    here = parse_location(root, anonymous(endpoint))
    once = {"config_kwargs": {"retries": {"max_attempts": 0}}}  # by botocore, which would wait half a minute
    elsewhere = parse_location(root, anonymous("http://127.0.0.1:9") | once)
    assert here.identity != elsewhere.identity
    assert SECRET not in parse_location(root, signed(endpoint)).identity
    with metadata_cache():
        assert here.read() is not None
        with pytest.raises(CellMapError, match=r"127\.0\.0\.1:9"):
            elsewhere.read()


@pytest.mark.usefixtures("quiet_lightning")
@pytest.mark.parametrize(
    "options", ["of the entry", *(pytest.param(o, marks=pytest.mark.slow) for o in ("own", "found"))]
)
def test_a_module_with_options_and_an_entry_with_others(bucket, endpoint, options):
    root = f"{bucket}/v2.zarr/recon-1"
    entry = {"raw": f"{root}/em/fibsem-uint8", "gt": f"{root}/labels/groundtruth/crop2/[mito,er]"}
    own = {"storage_options": anonymous(endpoint)}
    data = {
        "own": {"datasets": {"train": [entry]}, **own},
        "of the entry": {"datasets": {"train": [entry | own]}},
        "found": {
            "search_path": bucket, "split": "random", "val_fraction": 0.5, "only_crops": ["crop1", "crop2"], **own
        },
    }  # fmt: skip
    with CellMapDataModule(
        classes=["mito", "er"], input_arrays={"raw": SPEC}, target_arrays={"labels": SPEC}, batch_size=2,
        samples_per_epoch=4, cache="memory", **data[options],
    ) as module:  # fmt: skip
        assert len(list(module.train_dataloader())) == 2


def test_credentials_of_a_prediction_come_from_outside():
    assert "storage_options" in yaml.safe_load(
        (Path(__file__).parents[2] / "configs" / "data" / "cellmap.yaml").read_text()
    )


@pytest.mark.parametrize("folder", ["[2024] mito", "a*b", "what?"])
@pytest.mark.parametrize("store", ["zip", "memory"])
def test_folders_whose_names_are_patterns(tmp_path, folder, store):
    """Brackets, stars and question marks in names are no patterns."""
    import fsspec

    raw, target = write_pair(tmp_path, cube(), attributes=annotated(SEMANTIC))
    files = {f"{folder}/{p.relative_to(tmp_path)}": p for p in (tmp_path / "v.zarr").rglob("*") if p.is_file()}
    if store == "zip":
        with zipfile.ZipFile(tmp_path / "v.zip", "w") as archive:
            for name, file in files.items():
                archive.write(file, name)
    else:
        fs = fsspec.filesystem("memory")
        for name, file in files.items():
            fs.pipe_file(f"/{folder}-memory/{name}", file.read_bytes())
    head = {"zip": f"zip://{folder}", "memory": f"memory://{folder}-memory/{folder}"}[store]
    tail = f"::{tmp_path}/v.zip" if store == "zip" else ""
    found = sample(*(f"{head}/{path.removeprefix(f'{tmp_path}/')}{tail}" for path in (raw, target)))
    assert found["labels"].sum() == 16**3
