"""The pictures of a training: samples of one sheet differ from each other."""

from itertools import combinations

import pytest

from cellmap_lightning import CellMapDataModule
from cellmap_lightning.training import report


@pytest.fixture
def drawn(volume, tmp_path, monkeypatch):
    """A function that returns the headers of the samples that are drawn of validation crops."""

    def headers(targets, patch, count=4):
        spec = {"shape": patch, "scale": [10.48, 8, 8]}
        rows = []
        monkeypatch.setattr(report, "contact_sheet", lambda samples, *_, **__: rows.extend(samples))
        entries = [{"raw": volume.raw_path, "gt": f"{volume.path}/recon-1/labels/groundtruth/{t}"} for t in targets]
        datasets = {"validate": entries}
        data = CellMapDataModule(["mito", "er", "pm"], {"raw": spec}, {"labels": spec}, datasets=datasets)
        with data:
            data.setup("validate")
            report.write_samples(data.val_dataset, None, tmp_path / "samples.png", count=count)
        return rows

    return headers


def centre(row):
    """Crop and centre, nm, of a row."""
    crop, _, text = row.header.partition(", centre ")
    return crop, [float(part.split()[1]) for part in text.split(", ")]


@pytest.mark.parametrize("patch", [[32, 48, 48], [16, 24, 24], [8, 32, 32]], ids=str)
def test_no_sample_repeats_another(drawn, patch):
    rows = drawn(["crop4/[mito,er,pm]"], patch)
    assert 1 <= len(rows) <= 4
    extent = [n * s for n, s in zip(patch, (10.48, 8, 8), strict=True)]
    for (_, one), (_, other) in combinations(map(centre, rows), 2):
        assert any(abs(a - b) >= n / 2 for a, b, n in zip(one, other, extent, strict=True))


def test_every_crop_and_every_class_is_shown_before_one_is_shown_again(drawn):
    rows = drawn(["crop1/[mito,er]", "crop3/[mito,er,pm]", "crop4/[mito,er,pm]"], [16, 24, 24], count=3)
    assert len({centre(row)[0] for row in rows}) == 3
    shown = {number for row in rows for number, mask in enumerate(row.target) if (mask == 1).any()}
    assert shown == {0, 1, 2}
