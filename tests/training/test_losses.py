"""Losses, compared with torch, MONAI and written-out formulas on full annotation, and unchanged by unknown voxels."""

import numpy as np
import pytest
import torch
from monai.losses import DiceLoss, FocalLoss, SoftclDiceLoss, TverskyLoss
from scipy.ndimage import distance_transform_edt
from torch.nn import functional

from cellmap_lightning import CellMapError
from cellmap_lightning.training.losses import CLASSIFICATION, REGRESSION, MaskedLoss, parse_loss
from cellmap_lightning.training.masked import masked_bce, masked_dice

NAN = float("nan")
EVERY = [*((name, "sigmoid") for name in (*CLASSIFICATION, *REGRESSION)), *((name, "tanh") for name in REGRESSION)]


def loss_of(spec, activation="sigmoid", weights=None):
    return MaskedLoss(parse_loss("loss", spec, activation), activation, weights)


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 6, 7, 8, generator=generator)
    # Blobs, so that skeletons and distances are more than single voxels.
    target = functional.avg_pool3d(torch.rand(2, 3, 6, 7, 8, generator=generator), 3, 1, 1)
    return logits, (target > target.mean()).float()


def boundary_reference(logits, target):
    """Kervadec et al. 2019: the mean over voxels of p times the signed distance, as their one_hot2dist computes it."""
    total = []
    for c in range(target.shape[1]):
        parts = []
        for n in range(target.shape[0]):
            mask = target[n, c].numpy().astype(bool)
            signed = distance_transform_edt(~mask) * ~mask - (distance_transform_edt(mask) - 1) * mask
            parts.append(torch.sigmoid(logits[n, c]) * torch.from_numpy(signed))
        total.append(torch.stack(parts).mean())
    return torch.stack(total).mean().float()


def balanced_reference(logits, target):
    values = []
    for c in range(target.shape[1]):
        every = functional.binary_cross_entropy_with_logits(logits[:, c], target[:, c], reduction="none")
        values.append((every[target[:, c] == 1].mean() + every[target[:, c] == 0].mean()) / 2)
    return torch.stack(values).mean()


def cldice_reference(logits, target):
    """MONAI's loss of each channel; it pools over channels and has a value for each sample."""
    monai = SoftclDiceLoss(iter_=3, sigmoid=True, smooth=1e-12)
    return torch.stack([monai(logits[:, [c]], target[:, [c]]) for c in range(target.shape[1])]).mean()


REFERENCES = {
    "bce": functional.binary_cross_entropy_with_logits,
    "balanced_bce": balanced_reference,
    "focal": FocalLoss(gamma=2.0),
    "dice": DiceLoss(sigmoid=True, batch=True, smooth_nr=1.0, smooth_dr=1.0),
    "tversky": TverskyLoss(sigmoid=True, alpha=0.3, beta=0.7, batch=True, smooth_nr=1.0, smooth_dr=1.0),
    "cldice": cldice_reference,
    "boundary": boundary_reference,
    "mse": lambda x, y: functional.mse_loss(torch.sigmoid(x), y),
    "l1": lambda x, y: functional.l1_loss(torch.sigmoid(x), y),
    "smooth_l1": lambda x, y: functional.smooth_l1_loss(torch.sigmoid(x), y),
}


@pytest.mark.parametrize("name", [*CLASSIFICATION, *REGRESSION])
def test_full_annotation_equals_the_reference(pair, name):
    if name == "cldice":  # MONAI has a loss per sample, which is not pooled over the batch
        pair = tuple(x[:1] for x in pair)
    torch.testing.assert_close(loss_of({name: 1})(*pair), REFERENCES[name](*pair))


@pytest.mark.parametrize(("spec", "reference"), [
    ({"focal": {"gamma": 1.0}}, FocalLoss(gamma=1.0)),
    ({"tversky": {"weight": 1, "alpha": 0.5, "beta": 0.5, "smooth": 2}},
     TverskyLoss(sigmoid=True, alpha=0.5, beta=0.5, batch=True, smooth_nr=2.0, smooth_dr=2.0)),
    ({"smooth_l1": {"beta": 0.1}}, lambda x, y: functional.smooth_l1_loss(torch.sigmoid(x), y, beta=0.1)),
])  # fmt: skip
def test_options_reach_the_loss(pair, spec, reference):
    torch.testing.assert_close(loss_of(spec)(*pair), reference(*pair))


@pytest.mark.parametrize(("name", "activation"), EVERY)
@pytest.mark.parametrize("axis", [0, 2, 4])
def test_unknown_voxels_change_nothing(pair, name, activation, axis):
    logits, target = pair
    generator = torch.Generator().manual_seed(1)
    more = torch.cat([logits, torch.randn(logits.shape, generator=generator)], axis)
    unknown = torch.cat([target, torch.full_like(target, NAN)], axis)
    loss = loss_of({name: 1}, activation)
    torch.testing.assert_close(loss(more, unknown), loss(logits, target))


@pytest.mark.parametrize(("name", "activation"), EVERY)
def test_gradients_are_finite_and_zero_where_unknown(pair, name, activation):
    logits, target = pair[0].requires_grad_(), pair[1].clone()
    target[:, 1] = NAN
    target[:, :, 2:4, 1:3] = NAN
    loss_of({name: 1}, activation)(logits, target).backward()
    assert logits.grad.isfinite().all()
    assert (logits.grad[target.isnan()] == 0).all()
    assert logits.grad.abs().sum() > 0
    logits.grad = None
    nothing = loss_of({name: 1}, activation)(logits, torch.full_like(target, NAN))
    assert nothing == 0
    nothing.backward()
    assert logits.grad.abs().sum() == 0


@pytest.mark.parametrize("name", [*CLASSIFICATION, *REGRESSION])
def test_slices_equal_volumes_of_one_slice(pair, name):
    logits, target = (x[:, :, :1] for x in pair)
    target = target.clone()
    target[..., 2] = NAN
    flat, thin = loss_of({name: 1})(logits[:, :, 0], target[:, :, 0]), loss_of({name: 1})(logits, target)
    torch.testing.assert_close(flat, thin)


def test_terms_are_added_by_weight(pair):
    both = loss_of({"bce": 2, "dice": 0.5})(*pair)
    torch.testing.assert_close(both, 2 * masked_bce(*pair) + 0.5 * masked_dice(*pair))


def test_channels_of_affinities_are_weighted(pair):
    logits, target = pair
    weighted = loss_of({"bce": 1}, weights=(1.0, 3.0, 0.0))(logits, target)
    parts = [masked_bce(logits[:, [c]], target[:, [c]]) for c in range(3)]
    torch.testing.assert_close(weighted, (parts[0] + 3 * parts[1]) / 4)
    target[:, 0] = NAN  # without annotation its weight does not count either
    torch.testing.assert_close(loss_of({"bce": 1}, weights=(1.0, 3.0, 0.0))(logits, target), parts[1])


def test_class_numbers_have_cross_entropy_and_losses_of_each_class():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 5, 5, 5, generator=generator)
    target = torch.randint(0, 4, (2, 1, 5, 5, 5), generator=generator)
    found = loss_of({"ce": 1}, "softmax")(logits, target)
    torch.testing.assert_close(found, functional.cross_entropy(logits, target[:, 0]))
    plain = DiceLoss(softmax=True, include_background=False, to_onehot_y=True, batch=True, smooth_nr=1.0, smooth_dr=1.0)
    torch.testing.assert_close(loss_of({"dice": 1}, "softmax")(logits, target), plain(logits, target))
    target[:, :, 2:] = -100
    torch.testing.assert_close(
        loss_of({"ce": 1, "dice": 1}, "softmax")(logits, target),
        loss_of({"ce": 1, "dice": 1}, "softmax")(logits[:, :, :2], target[:, :, :2]),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_finite(dtype):
    logits = torch.full((1, 2, 32, 32, 32), 1.0, dtype=dtype, requires_grad=True)
    target = torch.ones(1, 2, 32, 32, 32, dtype=dtype)
    target[..., :16] = 0
    loss = loss_of({name: 1 for name, activation in EVERY if activation == "sigmoid"})(logits, target)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(("spec", "activation", "match"), [
    ({"bec": 1}, "sigmoid", r"loss: a loss for outputs with sigmoid must be one of bce, .*, got 'bec'; did you mean"),
    ({"bce": 1}, "tanh", r"outputs with tanh must be one of mse, l1, smooth_l1, got 'bce'"),
    ({"mse": 1}, "softmax", r"outputs with softmax must be one of ce, bce, .*, got 'mse'"),
    ({"bce": -1}, "sigmoid", r"loss.bce: weight must be a number from 0, got -1"),
    ({"bce": "1"}, "sigmoid", r"loss.bce: weight must be a number from 0, got '1'"),
    ({"bce": NAN}, "sigmoid", r"loss.bce: weight must be a number from 0, got nan"),
    ({"bce": 0, "dice": 0}, "sigmoid", r"loss: at least one weight must be above 0"),
    ({"focal": {"gama": 2}}, "sigmoid", r"loss.focal has no 'gama'; did you mean 'gamma'"),
    ({"bce": {"gamma": 2}}, "sigmoid", r"loss.bce has no 'gamma'; it has weight"),
    ({"cldice": {"iterations": 1.5}}, "sigmoid", r"loss.cldice: iterations must be a whole number, got 1.5"),
    ({}, "sigmoid", r"loss must be \{loss: weight\}"),
    ("bce", "sigmoid", r"loss must be \{loss: weight\}.*, got 'bce'"),
    ([{"bce": 1}], "sigmoid", r"loss must be \{loss: weight\}"),
])  # fmt: skip
def test_wrong_specifications_are_refused(spec, activation, match):
    with pytest.raises(CellMapError, match=match):
        parse_loss("loss", spec, activation)


def test_boundary_loss_is_least_for_the_target_itself(pair):
    _, target = pair
    right = loss_of({"boundary": 1})(20 * (2 * target - 1), target)
    others = [loss_of({"boundary": 1})(20 * (2 * other - 1), target) for other in (1 - target, target.roll(1, -1))]
    assert right < min(others)
    assert np.isfinite(float(right))
