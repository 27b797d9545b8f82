"""What the device does to a batch: torchvision's arithmetic and distributions, as functions of (seed, epoch, index)."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from alexnet_ddp.config import AlexNet2012AugmentConfig, BasicAugmentConfig
from alexnet_ddp.data.augment import build_augment
from alexnet_ddp.data.effects import (
    Effects,
    Mixing,
    Partners,
    apply_effects,
    normalise,
    partner_rows,
)
from alexnet_ddp.training.loss import CrossEntropy

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SIZE = 32
JITTERS = {
    "brightness": TF.adjust_brightness,
    "contrast": TF.adjust_contrast,
    "saturation": TF.adjust_saturation,
    "hue": TF.adjust_hue,
}


def images(n=6, seed=0) -> torch.Tensor:
    """uint8 [n, size, size, 3]: noise, one grey image, one black, and one of pure colours."""
    found = torch.randint(
        0, 256, (n, SIZE, SIZE, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    found[1] = found[1, :, :, :1]
    found[2] = 0
    found[3] = found[3] // 128 * 255
    return found


def drawn(
    n=20_000, seed=0, epoch=0, indices=None, size=SIZE, cfg=BasicAugmentConfig, **knobs
) -> Effects:
    """The effects on `indices` (or 0, 1, ... n - 1), each mixed with the one before it."""
    indices = np.arange(n) if indices is None else indices
    augment = build_augment(cfg(**knobs), seed, size, size)
    partners = (
        Partners(np.arange(len(indices)) - 1, np.zeros(len(indices), np.int64))
        if augment.mixes
        else None
    )
    return augment.effects(epoch, indices, size, partners, torch.from_numpy)


def mixing(**knobs) -> Mixing:
    return drawn(**knobs).mixing


def sides(boxes) -> tuple[np.ndarray, np.ndarray]:
    left, top, right, bottom = np.asarray(boxes).T
    return right - left, bottom - top


# Colours


@pytest.mark.parametrize("name", JITTERS)
def test_a_jitter_is_torchvisions(name):
    x = images()
    amounts = (
        torch.tensor([0.5, 0.3, 1.7, -0.5, 0.11, 0.0])
        if name == "hue"
        else torch.tensor([0, 0.3, 1, 1.7, 2, 0.9])
    )
    amounts = amounts.clamp(-0.5, 0.5) if name == "hue" else amounts
    ours = apply_effects(x, Effects(jitter={name: amounts}))
    for k, amount in enumerate(amounts.tolist()):
        expected = JITTERS[name](x[k].permute(2, 0, 1) / 255, amount)
        assert torch.allclose(ours[k], TF.normalize(expected, MEAN, STD), atol=1e-5 / min(STD)), (
            name,
            amount,
        )


def test_jitters_come_one_after_the_other_and_colour_noise_after_them():
    effects = drawn(6, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
    assert list(effects.jitter) == list(JITTERS)
    noise = torch.rand(6, 3) / 10
    ours = apply_effects(images(), Effects(colour=noise, jitter=effects.jitter))
    for k in range(6):
        expected = images()[k].permute(2, 0, 1) / 255
        for name, amounts in effects.jitter.items():
            expected = JITTERS[name](expected, amounts[k].item())
        expected = TF.normalize(expected + noise[k][:, None, None], MEAN, STD)
        assert torch.allclose(ours[k], expected, atol=1e-5 / min(STD))


def test_jitter_factors_have_torchvisions_distribution():
    jitter = drawn(brightness=0.4, contrast=1.0, saturation=0.3, hue=0.1).jitter
    bounds = {
        "brightness": (0.6, 1.4),
        "contrast": (0.0, 2.0),
        "saturation": (0.7, 1.3),
        "hue": (-0.1, 0.1),
    }
    for name, (low, high) in bounds.items():
        assert stats.kstest(jitter[name].numpy(), "uniform", (low, high - low)).pvalue > 1e-3
    assert abs(np.corrcoef([values.numpy() for values in jitter.values()]) - np.eye(4)).max() < 0.03
    alone = drawn(contrast=1.0).jitter
    assert list(alone) == ["contrast"]
    assert torch.equal(
        alone["contrast"], jitter["contrast"]
    )  # no knob changes what another one draws


# Erasing


def test_erased_rectangles_have_torchvisions_distribution():
    size, n = 224, 4_000
    boxes = drawn(20_000, size=size, erase=1.0).erased.numpy()
    torch.manual_seed(3)
    transform, blank = v2.RandomErasing(p=1.0), torch.empty(3, size, size, device="meta")
    found = [transform.make_params([blank]) for _ in range(n)]
    theirs = np.array(
        [[f["j"], f["i"], f["j"] + f["w"], f["i"] + f["h"]] for f in found if f["v"] is not None]
    )
    measures = {
        "area": lambda b: sides(b)[0] * sides(b)[1],
        "ratio": lambda b: sides(b)[1] / sides(b)[0],
        **{f"edge {k}": lambda b, k=k: b[:, k] for k in range(4)},
    }
    for name, measure in measures.items():
        assert stats.ks_2samp(measure(boxes), measure(theirs)).pvalue > 1e-3, name
    share = sides(boxes)[0] * sides(boxes)[1] / size**2
    assert (share.min(), share.max()) == (
        pytest.approx(0.02, abs=2e-3),
        pytest.approx(0.33, abs=2e-3),
    )
    assert boxes.min() >= 0
    assert boxes.max() <= size


def test_images_are_erased_at_the_rate_asked_for_and_to_the_mean_colour_in_the_box_only():
    boxes = drawn(erase=0.25).erased
    width, height = sides(boxes)
    assert ((width > 0) == (height > 0)).all()
    assert (width > 0).mean() == pytest.approx(0.25, abs=0.015)
    effects = drawn(6, erase=1.0, brightness=0.5)
    plain = apply_effects(images(), Effects(jitter=effects.jitter))
    for x, before, (left, top, right, bottom) in zip(
        apply_effects(images(), effects), plain, effects.erased.tolist()
    ):
        assert (x[:, top:bottom, left:right] == 0).all()
        expected = before.clone()
        expected[:, top:bottom, left:right] = 0
        assert torch.equal(x, expected)


# Mixing


def by_hand(x: torch.Tensor, m: Mixing) -> torch.Tensor:
    """Image by image, as the papers have it."""
    out = []
    for k in range(len(m.rows)):
        own, other = x[k], x[m.rows[k]]
        left, top, right, bottom = m.boxes[k].tolist()
        mixed = m.weight[k] * own + (1 - m.weight[k]) * other
        mixed[:, top:bottom, left:right] = other[:, top:bottom, left:right]
        out.append(mixed)
    return torch.stack(out)


@pytest.mark.parametrize(
    "knobs", [{"mixup_alpha": 0.8}, {"cutmix_alpha": 1.0}, {"mixup_alpha": 0.2, "cutmix_alpha": 1}]
)
def test_mixtures_are_those_of_the_formulas(knobs):
    m = mixing(n=6, **knobs)
    x = apply_effects(images(), Effects())
    assert torch.allclose(apply_effects(images(), Effects(mixing=m)), by_hand(x, m), atol=1e-5)


def test_mixup_and_cutmix_are_torchvisions_for_their_lambda_and_box():
    x = apply_effects(images(), Effects())
    for transform, share, weight, box in (
        (v2.MixUp(num_classes=4), 0.3, 0.3, (5, 5, 5, 5)),
        (v2.CutMix(num_classes=4), 1 - 12 * 20 / SIZE**2, 1.0, (4, 10, 16, 30)),
    ):
        labels = torch.tensor([0, 1, 2, 3, 0, 1])
        params = {
            "labels": labels,
            "batch_size": 6,
            "lam": share,
            "box": box,
            "lam_adjusted": share,
        }
        before = torch.arange(6) - 1
        m = Mixing(
            before % 6, labels[before], *(torch.tensor([v] * 6) for v in (weight, box, share))
        )
        ours = apply_effects(images(), Effects(mixing=m))
        assert torch.allclose(ours, transform.transform(x, params), atol=1e-6)
        logits = torch.randn(6, 4)
        batch = SimpleNamespace(labels=labels, effects=Effects(mixing=m))
        for smoothing in (0.0, 0.1):
            soft = transform.transform(labels, params)
            expected = F.cross_entropy(logits, soft, reduction="sum", label_smoothing=smoothing)
            assert CrossEntropy(smoothing)(logits, batch).item() == pytest.approx(
                expected.item(), rel=1e-5
            )


@pytest.mark.parametrize("alpha", [0.1, 0.2, 1.0, 4.0])
def test_mixup_weights_have_the_beta_distribution_and_are_the_shares_of_the_labels(alpha):
    m = mixing(n=100_000, mixup_alpha=alpha)
    weight = m.weight.double().numpy()
    assert weight.mean() == pytest.approx(0.5, abs=0.006)
    assert weight.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.02)
    for q in np.linspace(0.05, 0.85, 17):  # beyond it, a small alpha's weights are 1 in float32
        assert (weight <= stats.beta(alpha, alpha).ppf(q)).mean() == pytest.approx(q, abs=0.007)
    assert torch.equal(m.weight, m.share)
    assert (sides(m.boxes)[0] == 0).all()


def test_cutmix_boxes_have_torchvisions_distribution_and_shares_are_exactly_what_they_leave():
    size, n = 224, 4_000
    m = mixing(size=size, cutmix_alpha=1.0)
    width, height = sides(m.boxes)
    assert torch.equal(m.weight, torch.ones(20_000))
    assert np.allclose(m.share, 1 - width * height / size**2, atol=1e-7)
    assert m.boxes.min() >= 0
    assert m.boxes.max() <= size
    torch.manual_seed(1)
    transform, blank = v2.CutMix(num_classes=2), torch.empty(2, 3, size, size, device="meta")
    theirs = np.array([transform.make_params([blank])["box"] for _ in range(n)])
    for k in range(4):
        assert stats.ks_2samp(m.boxes[:, k].numpy(), theirs[:, k]).pvalue > 1e-3
    areas = [np.prod(sides(boxes), axis=0) for boxes in (m.boxes, theirs)]
    assert stats.ks_2samp(*areas).pvalue > 1e-3


def test_with_both_half_of_the_images_are_cut_and_the_others_blended():
    m = mixing(mixup_alpha=0.2, cutmix_alpha=1.0)
    is_cut = m.weight == 1
    assert is_cut.double().mean() == pytest.approx(
        0.5, abs=0.03
    )  # a few weights of mixup are 1 too
    alone = mixing(mixup_alpha=0.2)
    assert torch.equal(m.weight[~is_cut], alone.weight[~is_cut])


def test_a_partner_is_the_previous_image_or_itself_if_that_one_is_bad():
    assert partner_rows(np.arange(5), 4).tolist() == [4, 0, 1, 2]
    assert partner_rows(np.array([0, 2, 3, 4]), 4).tolist() == [
        3,
        1,
        1,
    ]  # slot 1 is bad: slot 2 keeps to itself
    assert partner_rows(np.array([0, 1, 2]), 3).tolist() == [
        0,
        0,
        1,
    ]  # the one before the batch is bad
    assert partner_rows(np.array([3]), 3).tolist() == []
    assert partner_rows(np.array([], dtype=np.int64), 0).tolist() == []


def test_an_image_mixed_with_itself_is_what_it_was():
    m = mixing(n=6, mixup_alpha=0.2, cutmix_alpha=1.0)
    itself = Mixing(torch.arange(6), m.labels, m.weight, m.boxes, m.share)
    assert torch.equal(
        apply_effects(images(), Effects(mixing=itself)), apply_effects(images(), Effects())
    )


# Where it comes from

ALL = {
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.4,
    "hue": 0.1,
    "erase": 0.5,
    "mixup_alpha": 0.2,
}
ALL |= {"cutmix_alpha": 1.0}


def flat(effects: Effects) -> list[torch.Tensor]:
    m = effects.mixing
    return [*effects.jitter.values(), effects.erased, m.weight, m.boxes, m.share]


def test_effects_depend_on_seed_epoch_and_index_only_and_not_on_the_batch():
    whole = flat(drawn(300, seed=3, epoch=2, **ALL))
    for some in (np.array([17]), np.arange(299, -1, -7), np.array([5, 5])):
        for part, all_ in zip(flat(drawn(seed=3, epoch=2, indices=some, **ALL)), whole):
            assert torch.allclose(part, all_[torch.from_numpy(some.copy())], rtol=1e-6)
    for other in (drawn(300, seed=4, epoch=2, **ALL), drawn(300, seed=3, epoch=1, **ALL)):
        assert all((a != b).float().mean() > 0.4 for a, b in zip(flat(other), whole))


def test_the_uses_are_independent_of_each_other():
    effects = drawn(
        **ALL | {"cutmix_alpha": 0}
    )  # a box of mixup is empty, and lies where it would be pasted
    columns = [
        effects.jitter["hue"],
        effects.erased[:, 0],
        effects.mixing.weight,
        effects.mixing.boxes[:, 0],
    ]
    columns = np.array([c.double().numpy() for c in columns])
    assert abs(np.corrcoef(columns) - np.eye(4)).max() < 0.03


@pytest.mark.parametrize("cfg", [BasicAugmentConfig, AlexNet2012AugmentConfig])
def test_with_all_options_off_pixels_are_only_normalised(cfg):
    effects = drawn(6, cfg=cfg)
    assert (effects.jitter, effects.erased, effects.mixing) == ({}, None, None)
    assert torch.equal(apply_effects(images(), effects), normalise(images(), effects.colour))
    assert not build_augment(cfg(), 0, SIZE, SIZE).mixes


def test_there_may_be_no_images():
    effects = drawn(indices=np.empty(0, np.int64), **ALL)
    assert apply_effects(images()[:0], effects).shape == (0, 3, SIZE, SIZE)


def test_the_device_never_makes_the_host_wait():
    """The meta device has no values: whatever asked for one, or for a shape that depends on one, would raise."""
    on_meta = build_augment(AlexNet2012AugmentConfig(**ALL), 0, SIZE, SIZE).effects(
        0,
        np.arange(6),
        SIZE,
        Partners(np.arange(5), np.zeros(5, np.int64)),
        lambda a: torch.from_numpy(a).to("meta"),
    )
    x = apply_effects(images().to("meta"), on_meta)
    assert x.shape == (5, 3, SIZE, SIZE)
    batch = SimpleNamespace(
        labels=torch.zeros(5, dtype=torch.int64, device="meta"), effects=on_meta
    )
    assert CrossEntropy(0.1)(torch.zeros(5, 7, device="meta"), batch).shape == ()


def test_what_the_network_sees_is_channels_last():
    effects = drawn(6, **ALL)
    assert apply_effects(images(), effects).is_contiguous(memory_format=torch.channels_last)


def test_the_effects_of_seed_zero_are_pinned():
    effects = drawn(3, **ALL)
    assert effects.jitter["brightness"].tolist() == pytest.approx(
        [0.785107, 0.870885, 1.223142], abs=1e-6
    )
    assert effects.jitter["hue"].tolist() == pytest.approx(
        [0.049656, 0.021836, -0.075428], abs=1e-6
    )
    assert effects.erased.tolist() == [[1, 20, 1, 20], [0, 17, 24, 28], [7, 16, 17, 26]]
    assert effects.mixing.weight.tolist() == pytest.approx([0.439367, 0.036963, 0.000009], abs=1e-6)
    assert mixing(n=3, cutmix_alpha=1.0).boxes.tolist() == [
        [0, 19, 16, 32],
        [17, 10, 32, 32],
        [16, 0, 32, 29],
    ]
