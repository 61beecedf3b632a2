"""Training images among the evaluation's: named when it is certain, noted when it is not."""

import shutil

import pytest

from tests.annotations.conftest import edit, read
from virtex_d2.annotations.checks.check import check
from virtex_d2.annotations.checks.kinds import KINDS
from virtex_d2.annotations.checks.leakage import leaks


def leaking(world, decode=True, **sample):
    train, val = (check(read(world, split=split), decode, **sample) for split in ("train", "val"))
    found = leaks(train.table, val.table, train.decoded, val.decoded)
    return [(each.kind, each.record, each.why) for each in found]


def test_sets_that_count_their_images_from_one_share_names_and_ids_but_no_image(sound):
    assert leaking(sound) == []


def test_names_alone_are_a_note_where_the_pixels_were_not_compared(sound):
    found = leaking(sound, decode=False)
    assert [kind for kind, _, _ in found] == ["leak-name"] * 4
    assert not KINDS["leak-name"].serious
    assert 0 < len(leaking(sound, sample=3, seed=1)) < 4


def test_a_copy_under_another_name_is_found_by_its_pixels(world):
    shutil.copy(world / "images/train/000004.jpg", world / "images/val/000001.jpg")
    ((kind, record, why),) = leaking(world)
    assert (kind, record) == ("leak-content", "image 2")
    assert why.startswith("in train: image 5, ")
    assert why.endswith("images/train/000004.jpg")
    assert KINDS[kind].serious


@pytest.mark.parametrize("decode", [True, False])
def test_the_same_file_is_found_without_decoding_and_through_linked_folders(decode, world):
    shutil.rmtree(world / "images/val")
    (world / "images/val").symlink_to(world / "images/train")
    found = leaking(world, decode)
    assert [kind for kind, _, _ in found] == ["leak-file"] * 4


def test_an_image_that_cannot_be_decoded_is_no_leak(world):
    for split in ("train", "val"):
        (world / f"images/{split}/000000.jpg").write_bytes(b"")
    edit(world, lambda content: content["images"][0].update(file_name="000000.jpg"))
    assert [kind for kind, _, _ in leaking(world)] == ["leak-name"]
