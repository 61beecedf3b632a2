"""The tests' browser sees what it is there to see."""

import base64
import io

from PIL import Image

from tests.browser import open_page


def _image(width=3):
    file = io.BytesIO()
    Image.new("RGB", (width, 2)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _page(tmp_path, body):
    path = tmp_path / "page.html"
    path.write_text(f"<!doctype html><title>A page</title><body>{body}</body>", encoding="utf-8")
    return open_page(path)


def test_a_sound_page_has_its_images_and_no_errors(tmp_path):
    page = _page(tmp_path, f"<p>words</p><img alt='a' src='{_image()}'>")
    assert (page.title, page.text.strip()) == ("A page", "words")
    assert [(image.alt, image.width, image.loaded) for image in page.images] == [("a", 3, True)]
    assert not page.errors
    assert not page.requests


def test_errors_of_scripts_and_messages_are_seen(tmp_path):
    page = _page(tmp_path, "<script>console.error('one'); console.log('two'); three();</script>")
    assert any("one" in message for message in page.errors)
    assert any("three is not defined" in message for message in page.errors)
    assert "log: two" in page.console


def test_images_that_do_not_load_and_requests_to_the_network_are_seen(tmp_path):
    body = "<img src='absent.png'><img src='http://example.com/x.png'><img src='data:image/png,no'>"
    page = _page(tmp_path, body)
    assert [image.loaded for image in page.images] == [False, False, False]
    assert page.requests == ["http://example.com/x.png"]
    assert page.errors


def test_a_large_page_arrives_whole(tmp_path):
    page = _page(tmp_path, "".join(f"<img src='{_image(width)}'>" for width in range(1, 400)))
    assert [image.width for image in page.images] == list(range(1, 400))
