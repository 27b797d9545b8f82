"""JPEGs that are cut before they are decoded: the pixels of the whole, from the bytes of a part."""

import io

import numpy as np
import pytest
from PIL import Image

from alexnet_ddp.data import restarts
from alexnet_ddp.data.decode import BadImage, crop_into


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (-(-height // 8) + 1, -(-width // 8) + 1, 3), dtype=np.uint8)
    smooth = np.asarray(
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    ).astype(np.int16)
    return Image.fromarray(
        np.clip(smooth + rng.normal(0, 9, smooth.shape), 0, 255).astype(np.uint8)
    )


def packed(width: int, height: int, quality: int = 90) -> bytes:
    out, blocks = io.BytesIO(), restarts.interval(width)
    photo(width, height).save(
        out, "JPEG", quality=quality, subsampling="4:2:0", restart_marker_blocks=blocks
    )
    return restarts.with_table(out.getvalue(), blocks)


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(bytes(data))))


SIZES = [(256, 341), (341, 256), (256, 256), (377, 256), (17, 33), (16, 16), (368, 256), (5, 300)]


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_a_cut_holds_the_pixels_of_the_whole_to_the_last_bit(width, height):
    data, rng = packed(width, height), np.random.default_rng(1)
    whole, cuts = pixels(data), 0
    for _ in range(60):
        left, top = int(rng.integers(0, width)), int(rng.integers(0, height))
        box = (
            left,
            top,
            int(rng.integers(1, width - left + 1)),
            int(rng.integers(1, height - top + 1)),
        )
        part = restarts.cut(data, box)
        if part is None:
            continue
        cuts += 1
        assert len(part.data) < len(data)
        found = pixels(part.data)
        x, y = box[0] - part.left, box[1] - part.top
        inside = found[y : y + box[3], x : x + box[2]]
        assert np.array_equal(inside, whole[box[1] : box[1] + box[3], box[0] : box[0] + box[2]])
    assert cuts > 20 or (width, height) in ((17, 33), (16, 16), (5, 300))


@pytest.mark.parametrize("size", [224, 64, 24])
def test_a_crop_of_a_cut_is_that_of_the_whole_at_every_scale_of_the_decoder(size, monkeypatch):
    data, rng = packed(341, 256), np.random.default_rng(2)
    slot, other = np.empty((size, size, 3), np.uint8), np.empty((size, size, 3), np.uint8)
    for _ in range(40):
        left, top = int(rng.integers(0, 200)), int(rng.integers(0, 150))
        box = left, top, int(rng.integers(20, 341 - left)), int(rng.integers(20, 256 - top))
        crop_into(slot, data, box, False)
        with monkeypatch.context() as patched:
            patched.setattr(restarts, "cut", lambda data, box: None)
            crop_into(other, data, box, False)
        assert np.array_equal(slot, other), box


def test_without_a_table_or_if_the_whole_image_is_needed_nothing_is_cut():
    out = io.BytesIO()
    photo(64, 64).save(out, "JPEG", restart_marker_blocks=2)
    assert restarts.cut(out.getvalue(), (0, 0, 16, 16)) is None
    assert restarts.cut(packed(64, 64), (0, 0, 64, 64)) is None
    assert restarts.cut(b"", (0, 0, 1, 1)) is None


def test_markers_part_a_row_into_whole_segments_of_few_blocks():
    assert [restarts.interval(width) for width in (256, 341, 336, 400, 368, 16, 48)] == [
        2,
        2,
        3,
        5,
        1,
        1,
        3,
    ]


def test_a_segment_too_long_for_the_table_leaves_the_file_as_it_was():
    noise = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (16, 16 * 700, 3), dtype=np.uint8)
    )
    out = io.BytesIO()
    noise.save(out, "JPEG", quality=100, subsampling="4:2:0", restart_marker_blocks=700)
    assert restarts.with_table(out.getvalue(), 700) == out.getvalue()


def test_a_file_cut_short_is_a_bad_image_for_any_crop():
    data, slot = packed(341, 256), np.empty((64, 64, 3), np.uint8)
    for end in (len(data) - 600, len(data) // 2):
        with pytest.raises(BadImage, match="damaged"):
            crop_into(slot, data[:end], (0, 0, 32, 32), False)


def test_an_edited_file_that_kept_the_comment_is_decoded_as_what_it_is():
    image, out = Image.open(io.BytesIO(packed(341, 256))), io.BytesIO()
    image.resize((200, 150)).save(out, "JPEG", comment=image.info["comment"])
    edited, slot = out.getvalue(), np.empty((50, 50, 3), np.uint8)
    assert restarts.has_table(edited)
    assert restarts.cut(edited, (0, 0, 50, 50)) is None
    crop_into(slot, edited, (10, 20, 50, 50), False)
    assert np.array_equal(slot, pixels(edited)[20:70, 10:60])


def test_a_jpeg_with_any_damaged_header_is_a_bad_image_or_is_decoded():
    data, rng, slot = packed(96, 64), np.random.default_rng(0), np.empty((16, 16, 3), np.uint8)
    end, bad = data.index(b"\xff\xda"), 0
    for _ in range(1_500):
        damaged = bytearray(data)
        damaged[int(rng.integers(20, end))] = int(rng.integers(256))
        slot[...] = 0
        try:
            crop_into(slot, bytes(damaged), (50, 30, 40, 30), False)
        except BadImage:
            bad += 1
            assert not slot.any()
        else:
            assert slot.any()  # no crop of the photograph is black
    assert 100 < bad < 1_400  # both ends are seen


def test_the_table_costs_little():
    out = io.BytesIO()
    photo(341, 256).save(out, "JPEG", quality=90, subsampling="4:2:0")
    assert len(packed(341, 256)) < 1.06 * len(out.getvalue())
