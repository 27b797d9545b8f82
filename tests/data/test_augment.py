"""Crops, flips and colours: torchvision's distributions, as functions of (seed, epoch, index) alone."""

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import RandomResizedCrop

from alexnet_ddp.config import AlexNet2012AugmentConfig, BasicAugmentConfig, NoAugmentConfig
from alexnet_ddp.data.augment import build_augment

SHAPES = [(500, 375), (375, 500), (64, 64), (33, 71), (600, 120), (5, 7)]  # width, height
FALLS_BACK = [(1000, 20), (20, 1000), (1002, 20), (13, 1002), (1001, 14), (1, 50), (50, 1), (1, 1)]
BOX = ("left", "top", "width", "height")


def augment(cfg=None, seed=0, image_size=224, eval_resize=256):
    return build_augment(cfg or BasicAugmentConfig(), seed, image_size, eval_resize)


def views_of(shape, n=6_000, epoch=0, **how):
    width, height = shape
    return augment(**how).views(epoch, np.arange(n), np.full(n, width), np.full(n, height))


def boxes(views) -> np.ndarray:
    return np.stack([getattr(views, name) for name in BOX], axis=1)


def torchvision_boxes(shape, n, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)) -> np.ndarray:
    """left, top, width, height, int64 [n, 4]."""
    torch.manual_seed(20)
    image = torch.empty(3, shape[1], shape[0], device="meta")
    found = [RandomResizedCrop.get_params(image, scale, ratio) for _ in range(n)]
    return np.array(found)[:, [1, 0, 3, 2]]


def assert_same_distribution(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Kolmogorov and Smirnov, for area, aspect, the four edges and where the box lies in what is free."""
    measures = {
        "area": lambda b: b[:, 2] * b[:, 3],
        "aspect": lambda b: b[:, 2] / b[:, 3],
        "left": lambda b: b[:, 0],
        "top": lambda b: b[:, 1],
        "right": lambda b: b[:, 0] + b[:, 2],
        "bottom": lambda b: b[:, 1] + b[:, 3],
        "diagonal": lambda b: b[:, 0] + b[:, 1] + b[:, 2] - b[:, 3],
    }
    for name, measure in measures.items():
        assert stats.ks_2samp(measure(ours), measure(theirs)).pvalue > 1e-3, name


@pytest.mark.sampled
@pytest.mark.parametrize("shape", SHAPES)
def test_random_resized_crop_has_torchvisions_distribution(shape):
    assert_same_distribution(boxes(views_of(shape)), torchvision_boxes(shape, 3_000))


def test_options_of_random_resized_crop_match_torchvision():
    cfg = BasicAugmentConfig(min_scale=0.3, max_scale=0.6, max_ratio=2.0)
    ours = boxes(views_of((300, 200), cfg=cfg))
    assert_same_distribution(ours, torchvision_boxes((300, 200), 3_000, (0.3, 0.6), (0.5, 2.0)))


def test_the_comparison_with_torchvision_would_notice_a_slightly_different_crop():
    theirs = torchvision_boxes((500, 375), 3_000)
    for cfg in (BasicAugmentConfig(min_scale=0.16), BasicAugmentConfig(max_ratio=1.5)):
        with pytest.raises(AssertionError):
            assert_same_distribution(boxes(views_of((500, 375), cfg=cfg)), theirs)


@pytest.mark.parametrize("shape", FALLS_BACK)
def test_an_image_no_crop_fits_into_gets_torchvisions_central_crop(shape):
    theirs = torchvision_boxes(shape, 30)
    assert len(np.unique(theirs, axis=0)) == 1
    assert np.array_equal(np.unique(boxes(views_of(shape, 1_000)), axis=0), theirs[:1])


@pytest.mark.parametrize(
    "cfg", [BasicAugmentConfig(), BasicAugmentConfig(min_scale=0, max_ratio=9)]
)
def test_boxes_lie_inside_of_images_of_any_shape(cfg):
    check_inside(cfg)


def test_boxes_of_alexnet_2012_lie_inside_of_images_of_any_shape():
    check_inside(AlexNet2012AugmentConfig())


def check_inside(cfg) -> None:
    draw = np.random.default_rng(0)
    widths, heights = draw.integers(1, 40, (2, 20_000)) ** draw.integers(1, 3, (2, 20_000))
    views = augment(cfg).views(0, np.arange(20_000), widths, heights)
    assert {getattr(views, name).dtype for name in BOX} == {np.dtype(np.int64)}
    assert views.flip.dtype == bool
    assert min(views.left.min(), views.top.min()) >= 0
    assert min(views.width.min(), views.height.min()) >= 1
    assert (views.left + views.width <= widths).all()
    assert (views.top + views.height <= heights).all()


def test_every_place_in_a_small_image_is_used_including_the_last_column_and_row():
    found = boxes(views_of((5, 7), 20_000, cfg=BasicAugmentConfig(min_scale=0.08, max_scale=0.1)))
    assert set(found[found[:, 2] == 2, 0]) == {0, 1, 2, 3}
    assert set(found[found[:, 3] == 2, 1]) == {0, 1, 2, 3, 4, 5}


@pytest.mark.parametrize("cfg", [BasicAugmentConfig, AlexNet2012AugmentConfig])
def test_flips_come_at_the_rate_asked_for_and_independently_of_the_box(cfg):
    for rate in (0.0, 0.25, 0.5, 1.0):
        views = views_of((300, 200), 20_000, cfg=cfg(flip=rate))
        assert views.flip.mean() == pytest.approx(rate, abs=4 * np.sqrt(rate * (1 - rate) / 20_000))
    views = views_of((300, 200), 20_000, cfg=cfg(flip=0.5))
    for name in ("left", "top"):
        assert abs(np.corrcoef(views.flip, getattr(views, name))[0, 1]) < 0.03


@pytest.mark.parametrize("cfg", [BasicAugmentConfig(), AlexNet2012AugmentConfig()])
def test_a_view_depends_on_seed_epoch_and_index_only_and_not_on_the_batch(cfg):
    draw = np.random.default_rng(1)
    widths, heights = draw.integers(20, 600, (2, 300))
    how = augment(cfg, seed=4)
    whole = how.views(2, np.arange(300), widths, heights)
    colours = how.colour(2, np.arange(300))
    for some in (
        np.array([17]),
        np.arange(299, -1, -7),
        draw.permutation(300)[:64],
        np.array([5, 5]),
    ):
        part = augment(cfg, seed=4).views(2, some, widths[some], heights[some])
        assert np.array_equal(boxes(part), boxes(whole)[some])
        assert np.array_equal(part.flip, whole.flip[some])
        if colours is not None:
            assert np.allclose(how.colour(2, some), colours[some], rtol=1e-6, atol=0)


@pytest.mark.parametrize("cfg", [BasicAugmentConfig(), AlexNet2012AugmentConfig()])
def test_another_seed_epoch_or_index_is_another_view(cfg):
    size = np.full(1_000, 500)

    def seen(seed, epoch, first=0):
        return augment(cfg, seed).views(epoch, np.arange(first, first + 1_000), size, size)

    here = seen(0, 0)
    for other in (seen(1, 0), seen(0, 1), seen(0, 0, first=1)):
        assert (boxes(here) != boxes(other))[:, :2].all(axis=1).mean() > 0.95
        assert (here.flip != other.flip).mean() == pytest.approx(0.5, abs=0.07)
        assert abs(np.corrcoef(here.left, other.left)[0, 1]) < 0.12


def test_no_images_have_no_views():
    none = np.empty(0, dtype=np.int64)
    for cfg in (BasicAugmentConfig(), AlexNet2012AugmentConfig()):
        assert boxes(augment(cfg).views(0, none, none, none)).shape == (0, 4)
    assert augment(AlexNet2012AugmentConfig()).colour(0, none).shape == (0, 3)


def test_no_augmentation_is_none_so_that_images_are_seen_as_the_evaluation_sees_them():
    assert build_augment(NoAugmentConfig(), 0, 224, 256) is None


@pytest.mark.parametrize("shape", [(256, 256), (512, 256), (256, 401), (300, 1_000)])
def test_alexnet_2012_crops_squares_uniformly_out_of_the_central_square(shape):
    views = views_of(shape, 40_000, cfg=AlexNet2012AugmentConfig())
    short = min(shape)
    side = round(short * 224 / 256)
    assert set(views.width) == set(views.height) == {side}
    x, y = views.left - (shape[0] - short) // 2, views.top - (shape[1] - short) // 2
    places = short - side + 1
    for offset in (x, y):
        assert offset.min() == 0
        assert offset.max() == short - side
        assert stats.chisquare(np.bincount(offset, minlength=places)).pvalue > 1e-3
    coarse = (4 * x // places) * 4 + 4 * y // places
    expected = np.bincount(4 * np.arange(places) // places) / places
    assert (
        stats.chisquare(np.bincount(coarse), 40_000 * np.outer(expected, expected).ravel()).pvalue
        > 1e-3
    )


def test_colour_shifts_have_the_covariance_of_the_paper():
    """Krizhevsky 2012, 4.1: P (alpha * lambda), alpha ~ N(0, sigma^2): covariance sigma^2 P diag(lambda^2) P^T."""
    values = np.array([0.2175, 0.0188, 0.0045])
    vectors = np.array(
        [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
    )
    for sigma in (0.1, 0.5):
        shift = augment(AlexNet2012AugmentConfig(colour_sigma=sigma)).colour(0, np.arange(200_000))
        assert shift.shape == (200_000, 3)
        assert shift.dtype == np.float32
        expected = sigma**2 * vectors @ np.diag(values**2) @ vectors.T
        assert np.allclose(np.cov(shift.T.astype(np.float64)), expected, rtol=0.015, atol=0)
        assert abs(shift.mean(0)).max() < 4 * sigma * 0.13 / np.sqrt(200_000)
        alpha = shift @ vectors / (sigma * values)  # the columns are orthonormal
        for column in alpha.T:
            assert stats.kstest(column[:20_000], "norm").pvalue > 1e-3
        assert abs(np.corrcoef(alpha.T) - np.eye(3)).max() < 0.02


def test_colour_depends_on_seed_epoch_and_index_and_is_independent_of_the_box():
    how = augment(AlexNet2012AugmentConfig())
    index = np.arange(20_000)
    here = how.colour(0, index)
    assert np.array_equal(here, how.colour(0, index))
    others = (
        how.colour(1, index),
        how.colour(0, index + 1),
        augment(AlexNet2012AugmentConfig(), 1).colour(0, index),
    )
    for other in others:
        assert abs(np.corrcoef(here[:, 0], other[:, 0])[0, 1]) < 0.03
    left = views_of((400, 400), 20_000, cfg=AlexNet2012AugmentConfig()).left
    assert abs(np.corrcoef(here[:, 0], left)[0, 1]) < 0.03


def test_without_colour_noise_nothing_is_added():
    assert augment().colour(0, np.arange(3)) is None
    assert augment(AlexNet2012AugmentConfig(colour_sigma=0)).colour(0, np.arange(3)) is None


def test_the_views_of_seed_zero_are_pinned():
    views = views_of((500, 375), 3)
    assert np.column_stack([boxes(views), views.flip]).tolist() == [
        [83, 33, 252, 330, 1],
        [102, 61, 318, 314, 0],
        [242, 69, 233, 235, 1],
    ]
