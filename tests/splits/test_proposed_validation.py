"""A training without crops for validation: the message names only settings that these crops allow."""

import pytest

from cellmap_lightning import CellMapDataModule
from cellmap_lightning.errors import CellMapKeyError
from cellmap_lightning.splits.proposed_validation import no_validation, override, python_setting
from tests.runs import GT


def data_of(volume, crops, patch=(8, 16, 16), usage="train"):
    array = {"shape": list(patch), "scale": [10.48, 8, 8]}
    listed = [{"raw": volume.raw_path, "gt": f"{volume.path}/{GT}/crop{n}/[mito,er]"} for n in crops]
    return CellMapDataModule(
        datasets={usage: listed}, classes=["mito", "er"], input_arrays={"raw": array}, target_arrays={"labels": array}
    )


@pytest.mark.parametrize(
    ("crops", "patch", "said", "unsaid"),
    [
        (
            (2, 3, 4), (8, 16, 16),
            [
                "list some; or data.split=random data.val_fraction=0.2 takes 1 of the 3 crops for training; or data.sp",
                "; or data.split=blocks cuts those for training (",
                ", and the other 2 like it); trainer.limit_val_batches=0 trains without validation",
            ],
            [],
        ),
        ((2,), (8, 16, 16), ["list some; or data.split=blocks cuts those for training ("], ["random", "like it"]),
        ((2, 3), (16, 32, 32), ["data.split=random data.val_fraction=0.2 takes 1 of the 2 crops"], ["blocks"]),
        ((2,), (16, 32, 32), ["can neither be divided nor cut; trainer.limit_val_batches=0 trains"], ["data.split"]),
    ],
    ids=["both", "one crop", "small crops", "one small crop"],
)  # fmt: skip
def test_proposals_are_those_that_work(volume, crops, patch, said, unsaid):
    with data_of(volume, crops, patch) as data:
        text = no_validation(data.splits, override, "trainer.limit_val_batches=0")
    assert text.startswith("datasets has no crops for validation; ")
    assert [part for part in said if part not in text] == [], text
    assert [part for part in unsaid if part in text] == [], text
    assert "\n" not in text or "neither" in text


def test_arguments_of_python(volume):
    with data_of(volume, (2, 3, 4)) as data:
        data.setup("fit")
        with pytest.raises(CellMapKeyError) as info:
            data.val_dataloader()
    assert "split='random' val_fraction=0.2 takes 1 of the 3 crops for training; or split='blocks'" in str(info.value)
    assert str(info.value).endswith("Trainer(limit_val_batches=0) trains without validation")


def test_without_any_crop_nothing_is_proposed(volume):
    with data_of(volume, (2,), usage="test") as data:
        text = no_validation(data.splits, python_setting, "Trainer(limit_val_batches=0)")
    assert text.endswith("no crops for validation, and none for training; list some with the usages train and validate")


@pytest.mark.parametrize(
    ("value", "typed", "written"),
    [
        ("random", "data.split=random", "split='random'"),
        ({"blocks": {"axis": "z"}}, "'data.split={blocks: {axis: z}}'", "split={'blocks': {'axis': 'z'}}"),
        (0.2, "data.split=0.2", "split=0.2"),
    ],
)
def test_a_setting_in_both_forms(value, typed, written):
    assert (override("split", value), python_setting("split", value)) == (typed, written)
