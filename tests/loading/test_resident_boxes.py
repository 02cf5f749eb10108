"""Batches of crops that are cut into boxes, gathered on the device and read on the host."""

import pytest
import torch

from tests.runs import GT, Watch, module, task, trainer


def seen(volume, tmp_path, cache):
    """The batches of the training and validation steps, and the bytes on the device."""
    crop = {"raw": volume.raw_path, "gt": f"{volume.path}/{GT}/crop2/[mito,er,pm]"}
    watch = Watch()
    spatial = {"mirror": {"axes": {"x": 0.5}}, "transpose": {"axes": ["y", "x"]}}
    options = {"datasets": {"train": [crop]}, "split": {"blocks": {"gap_nm": 0}}, "spatial_transforms": spatial}
    with module(volume, cache=cache, **options) as data:
        trainer(tmp_path, callbacks=[watch]).fit(task(), data)
        resident = data.residents.cache
        nbytes = resident.nbytes if resident is not None else 0
    return watch.batches, nbytes


@pytest.mark.usefixtures("quiet_lightning")
def test_boxes_on_the_device_are_those_of_the_host(volume, tmp_path):
    host, _ = seen(volume, tmp_path, "memory")
    resident, nbytes = seen(volume, tmp_path, "device")
    assert nbytes > 0
    assert len(host) == len(resident) > 0
    for one, other in zip(host, resident, strict=True):
        for name in one:
            assert torch.equal(torch.nan_to_num(one[name], -7), torch.nan_to_num(other[name], -7)), name
