import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from cellmap_lightning.training.masked import DiceScore, masked_bce, masked_cross_entropy, masked_dice, one_against_all

NAN = float("nan")


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, 6, generator=generator)
    target = (torch.rand(2, 3, 4, 5, 6, generator=generator) < 0.3).float()
    return logits, target


def test_full_annotation_equals_unmasked_loss(pair):
    logits, target = pair
    torch.testing.assert_close(masked_bce(logits, target), binary_cross_entropy_with_logits(logits, target))
    from monai.losses import DiceLoss

    plain = DiceLoss(sigmoid=True, batch=True, smooth_nr=1.0, smooth_dr=1.0)(logits, target)
    torch.testing.assert_close(masked_dice(logits, target), plain)


@pytest.mark.parametrize("loss", [masked_bce, masked_dice])
def test_unannotated_voxels_are_ignored(pair, loss):
    logits, target = pair
    more = torch.cat([logits, torch.randn_like(logits)], dim=2)
    unknown = torch.cat([target, torch.full_like(target, NAN)], dim=2)
    torch.testing.assert_close(loss(more, unknown), loss(logits, target))


@pytest.mark.parametrize("loss", [masked_bce, masked_dice])
def test_unannotated_class_is_ignored(pair, loss):
    logits, target = pair
    target[:, 1] = NAN
    torch.testing.assert_close(loss(logits, target), loss(logits[:, [0, 2]], target[:, [0, 2]]))


@pytest.mark.parametrize("loss", [masked_bce, masked_dice])
def test_no_annotation_gives_zero_loss_with_gradient(loss):
    logits = torch.randn(1, 2, 3, 3, 3, requires_grad=True)
    value = loss(logits, torch.full((1, 2, 3, 3, 3), NAN))
    assert value == 0
    value.backward()
    assert logits.grad.abs().sum() == 0


def test_classes_are_weighted_equally():
    """One annotated voxel of a class has the same weight as a thousand voxels of the other class."""
    logits = torch.zeros(1, 2, 1, 1, 1000)
    target = torch.zeros(1, 2, 1, 1, 1000)
    target[0, 1, 0, 0, 1:] = NAN
    logits[0, 1, 0, 0, 0] = 10.0
    common, rare = (binary_cross_entropy_with_logits(torch.tensor(v), torch.tensor(0.0)) for v in (0.0, 10.0))
    torch.testing.assert_close(masked_bce(logits, target), (common + rare) / 2)


def test_dice_is_pooled_over_batches_and_ignores_unannotated_voxels():
    metric = DiceScore(["a", "b", "c"])
    logits = torch.tensor([1.0, 1.0, -1.0, -1.0]).reshape(1, 1, 1, 1, 4).repeat(1, 3, 1, 1, 1)
    target = torch.tensor([[1.0, 0.0, 1.0, NAN], [NAN] * 4, [0.0] * 4]).reshape(1, 3, 1, 1, 4)
    metric.update(logits, target)
    other = torch.tensor([[1.0, 1.0, 1.0, 1.0], [NAN] * 4, [0.0] * 4]).reshape(1, 3, 1, 1, 4)
    metric.update(logits, other)
    result = metric.compute()
    # a: found 2 + 2, true 2 + 4, both 1 + 2
    assert result["dice"][0] == 2 * 3 / (4 + 6)
    assert result["constant"][0] == 2 * 6 / (7 + 6)
    assert result["occurs"].tolist() == [True, False, False]
    with pytest.raises(ValueError, match="do not fit 3 classes"):
        metric.update(logits[:, :2], target[:, :2])


def test_counts_stay_exact_in_half_precision():
    metric = DiceScore(["a"]).to(torch.bfloat16)
    assert metric.tp.dtype == torch.int64


def test_masked_cross_entropy_ignores_unannotated_voxels():
    logits = torch.randn(2, 4, 3, 3, 3)
    target = torch.randint(0, 4, (2, 1, 3, 3, 3))
    known = torch.ones_like(target, dtype=torch.bool)
    torch.testing.assert_close(
        masked_cross_entropy(logits, target, known), torch.nn.functional.cross_entropy(logits, target[:, 0])
    )
    more = torch.cat([target, torch.full_like(target, -100)], 2)
    unknown = torch.cat([known, ~known], 2)
    twice = torch.cat([logits, torch.randn_like(logits)], 2)
    torch.testing.assert_close(masked_cross_entropy(twice, more, unknown), masked_cross_entropy(logits, target, known))


def test_one_against_all_equals_softmax():
    logits = torch.randn(1, 3, 2, 2, 2)
    target = torch.tensor([0, 1, 2, -100, 1, 1, 0, 2]).reshape(1, 1, 2, 2, 2)
    against, wanted = one_against_all(logits, target, target >= 0)
    torch.testing.assert_close(torch.sigmoid(against), torch.softmax(logits, 1)[:, 1:])
    assert wanted[0, 0].flatten()[:3].tolist() == [0, 1, 0]
    assert wanted[0, :, 0, 1, 1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_finite(dtype):
    logits = torch.full((2, 2, 64, 64, 64), 1.0, dtype=dtype, requires_grad=True)
    target = torch.ones(2, 2, 64, 64, 64, dtype=dtype)
    loss = masked_bce(logits, target) + masked_dice(logits, target)
    numbers = torch.ones(2, 1, 64, 64, 64, dtype=torch.int64)
    against, wanted = one_against_all(logits, numbers, numbers > 0)
    loss = loss + masked_dice(against, wanted) + masked_cross_entropy(logits, numbers, numbers > 0)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()
