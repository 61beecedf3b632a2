"""Pages of HTML: texts stay texts, and a page is one file."""

from pathlib import Path

from PIL import Image

import virtex_d2.studies
from tests.browser import open_page
from tests.conftest import ROOT
from virtex_d2.studies.page import Picture, definitions, figure, machine, write_page


def test_texts_are_escaped_and_pictures_are_inside(tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    picture = Picture(tmp_path / "red.png", '"red" & <b>', "a < b")
    body = definitions({"<i>": "x & y"}) + figure(picture)
    write_page(tmp_path / "page.html", "<title> & more", body, "dt { color: #123456 }")
    (tmp_path / "red.png").unlink()
    page = open_page(tmp_path / "page.html")
    assert (page.title, page.console, page.requests) == ("<title> & more", [], [])
    assert [line for line in page.text.splitlines() if line] == ["<i>", "x & y", "a < b"]
    assert [(image.alt, image.width) for image in page.images] == [('"red" & <b>', 40)]
    assert "dt { color: #123456 }" in (tmp_path / "page.html").read_text()


def test_the_machine_and_the_versions_are_named():
    facts = machine()
    assert "cores usable" in facts["Processor"]
    assert "torch 2." in facts["Versions"]


def test_the_templates_are_a_part_of_the_package():
    templates = Path(virtex_d2.studies.__file__).parent / "templates"
    assert {path.suffix for path in templates.iterdir()} == {".html"}
    assert '"virtex_d2.studies": ["templates/*.html"]' in (ROOT / "setup.py").read_text()
