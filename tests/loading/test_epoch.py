import logging

import pytest

from cellmap_lightning.errors import CellMapTypeError, CellMapValueError
from cellmap_lightning.loading.epoch import DroppedSamples, check_epoch_settings, epoch_samples
from cellmap_lightning.loading.run import Run
from tests.runs import trainer


@pytest.mark.parametrize(
    ("samples", "batches", "batch_size", "world", "expected"),
    [(None, None, 2, 1, 2000), (None, 3, 4, 2, 12), (11, None, 4, 2, 11), (8, None, 4, 2, 8)],
)
def test_the_length_of_an_epoch(samples, batches, batch_size, world, expected):
    check_epoch_settings(samples, batches)
    assert epoch_samples(samples, batches, batch_size, world) == expected


@pytest.mark.parametrize(("samples", "batches", "text"), [(7, None, 7), (None, 1, 4)])
def test_an_epoch_without_a_batch_for_each_rank_is_refused(samples, batches, text):
    match = f"an epoch of {text} samples has no complete batch of 4 for each of 2 ranks; raise samples_per_epoch"
    with pytest.raises(CellMapValueError, match=match):
        epoch_samples(samples, batches, 4, 2)


def test_two_lengths_of_an_epoch_are_refused():
    with pytest.raises(CellMapTypeError, match="samples_per_epoch and batches_per_epoch exclude each other"):
        check_epoch_settings(4, 2)


def test_dropped_samples_are_logged_once_for_each_number(caplog):
    dropped, alone = DroppedSamples(), Run(None)
    with caplog.at_level(logging.INFO, "cellmap_lightning.loading.epoch"):
        for samples, batch_size in ((8, 4), (11, 4), (11, 4), (11, 1), (13, 4), (13, 5), (13, 4)):
            dropped.report(samples, batch_size, alone)
    texts = [record.getMessage().partition(" (")[0] for record in caplog.records]
    assert texts == [
        "train: an epoch of 11 samples is 2 global batches of 4",
        "train: an epoch of 13 samples is 3 global batches of 4",
        "train: an epoch of 13 samples is 2 global batches of 5",
        "train: an epoch of 13 samples is 3 global batches of 4",
    ]
    assert "the last 1 sample fills no batch and is dropped" in caplog.text


def test_a_run_before_its_beginning(tmp_path):
    for run in (Run(None), Run(trainer(tmp_path))):
        assert (run.is_running, run.is_fit, run.device.type, run.world, run.reports) == (False, False, "cpu", 1, True)
