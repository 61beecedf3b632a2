"""Folders of images: one walker for all tools."""

import pytest

from virtex_d2.engine.errors import InputError
from virtex_d2.engine.images import files_in, image_suffix, images_in


def test_folders_are_walked_alike_everywhere(tmp_path, caplog):
    """Hidden names are left out, links followed, circles of them not."""
    names = ["b/2.jpg", "a.PNG", ".c.jpg", ".d/e.jpg", "b/f.avif", "g", "b/notes.txt", "h.jpg?w=6"]
    for name in names:
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "i.jpeg").touch()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "other")
    (tmp_path / "other" / "back").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "itself").symlink_to("itself")
    (tmp_path / "root" / "b" / "up").symlink_to("..")
    found = ["a.PNG", "b/2.jpg", "b/f.avif", "h.jpg?w=6", "link/i.jpeg"]
    assert images_in(str(tmp_path / "root"), beside=("txt",)) == found
    assert "2 files are left out" in caplog.text
    assert "suffix: g, itself" in caplog.text
    assert "b/notes.txt" in files_in(str(tmp_path / "root"))


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        *(("a.JPG", "jpg"), ("a.b.jfif", "jfif"), ("what?.png", "png"), ("a.jpg?w=1.5", "jpg")),
        *(("a.txt", ""), ("jpg", "jpg"), ("a.", ""), ("a.jpg.part", ""), ("a.png?b.txt", "png")),
    ],
)
def test_a_name_says_whether_it_is_an_images(name, suffix):
    assert image_suffix(name) == suffix


def test_folders_without_images_and_none_at_all_are_refused_by_name(tmp_path):
    (tmp_path / "a.dat").touch()
    with pytest.raises(InputError, match=r"has no image.*1 file is left out.*: a\.dat"):
        images_in(str(tmp_path))
    for name in ("a.dat", "none"):
        with pytest.raises(InputError, match=f"{name}: the folder cannot be read"):
            files_in(str(tmp_path / name))
