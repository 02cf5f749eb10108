"""Threads, pickling and closing of datasets."""

import logging
import pickle
import threading

import pytest
import torch

from cellmap_lightning import CellMapDataset, CellMapError
from cellmap_lightning.crops.options import ReadOptions
from tests.conftest import CLASSES, INPUTS, TARGETS, reading_threads
from tests.make import make_dataset


def crop(volume, number, names="mito,er,pm"):
    return f"{volume.path}/recon-1/labels/groundtruth/crop{number}/[{names}]"


@pytest.fixture
def dataset(volume):
    with CellMapDataset(volume.raw_path, crop(volume, 2), CLASSES, INPUTS, TARGETS) as dataset:
        yield dataset


def test_one_executor_until_close(volume, no_threads_left):
    dataset = CellMapDataset(
        volume.raw_path, crop(volume, 2), CLASSES, INPUTS, TARGETS, read=ReadOptions(max_workers=3)
    )
    assert reading_threads() == []
    first = dataset.executor
    dataset[0]
    assert dataset.executor is first
    assert 1 <= len(reading_threads()) <= 3
    assert all(name.startswith("cellmap") for name in reading_threads())
    dataset.close()
    assert reading_threads() == []
    dataset[0]
    assert dataset.executor is not first
    dataset.close()


def test_concurrent_threads_create_one_executor(dataset):
    found = []
    barrier = threading.Barrier(8)

    def ask():
        barrier.wait()
        found.append(dataset.executor)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(set(map(id, found))) == 1


def test_eight_threads_read_the_same_as_one(volume):
    """Reads store no state on shared objects."""
    with CellMapDataset(
        volume.raw_path, crop(volume, 2), CLASSES, INPUTS, TARGETS, is_train=True,
        spatial_transforms={"mirror": {"axes": {"x": 0.5}}, "rotate": {"axes": {"z": [-180, 180]}}},
    ) as dataset:  # fmt: skip
        picked = list(range(0, len(dataset), max(1, len(dataset) // 40)))
        serial = {i: dataset[i] for i in picked}
        wrong = []

        def read(order):
            for i in order:
                sample = dataset[i]
                if not all(torch.equal(sample[n].nan_to_num(-1), serial[i][n].nan_to_num(-1)) for n in sample):
                    wrong.append(i)

        threads = [threading.Thread(target=read, args=(picked[k:] + picked[:k],)) for k in range(8)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert not wrong


def test_a_pickled_dataset_reads_the_same_with_separate_threads(dataset):
    dataset[0]
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[1]["raw"], dataset[1]["raw"])
    assert copy.executor is not dataset.executor
    copy.close()


def test_workers_from_argument_and_environment(volume, monkeypatch):
    def make(**kwargs):
        return make_dataset(volume.raw_path, input_arrays=INPUTS, **kwargs)

    monkeypatch.setattr("os.cpu_count", lambda: 64)
    assert make().max_workers == 4
    monkeypatch.setenv("CELLMAP_MAX_WORKERS", "7")
    assert make().max_workers == 7
    assert make(max_workers=2).max_workers == 2
    monkeypatch.setenv("CELLMAP_MAX_WORKERS", "many")
    with pytest.raises(CellMapError, match="CELLMAP_MAX_WORKERS must be a positive whole number, got 'many'"):
        make()


def test_a_single_worker_is_enough(volume):
    with CellMapDataset(
        volume.raw_path, crop(volume, 2), CLASSES, INPUTS, TARGETS, read=ReadOptions(max_workers=1)
    ) as dataset:
        dataset.read(dataset.draw(range(8), shuffle=True, seed=0))


def test_one_line_is_logged(volume, caplog):
    with caplog.at_level(logging.DEBUG, "cellmap_lightning.crops.crop"):
        CellMapDataset(volume.raw_path, crop(volume, 2, "mito,er"), CLASSES, INPUTS, TARGETS)
    (line,) = [r.getMessage() for r in caplog.records if r.name == "cellmap_lightning.crops.crop"]
    for part in ("volume/crop2", "annotated ['mito', 'er']", "not annotated ['pm']", "positions", "workers"):
        assert part in line


def test_closing_while_others_read(volume):
    """Readers get an error, or continue with new threads; nothing else happens, and nothing hangs."""
    dataset = CellMapDataset(
        volume.raw_path, crop(volume, 2), CLASSES, INPUTS, TARGETS, read=ReadOptions(max_workers=2)
    )
    stop, wrong = threading.Event(), []

    def read():
        while not stop.is_set():
            try:
                dataset[0]
            except CellMapError as e:
                if "closed while it was read" not in str(e):
                    wrong.append(e)
            except BaseException as e:
                wrong.append(e)

    threads = [threading.Thread(target=read) for _ in range(3)]
    [t.start() for t in threads]
    for _ in range(30):
        dataset.close()
    stop.set()
    [t.join(120) for t in threads]
    dataset.close()
    assert wrong == []
    assert not any(t.is_alive() for t in threads)


def test_a_task_of_the_pool_may_read(volume):
    """With one thread it would wait for itself."""
    with CellMapDataset(
        volume.raw_path, crop(volume, 2), CLASSES, INPUTS, TARGETS, read=ReadOptions(max_workers=1)
    ) as dataset:
        assert torch.equal(dataset.executor.submit(lambda: dataset[0]).result(120)["raw"], dataset[0]["raw"])
