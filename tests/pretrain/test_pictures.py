import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.methods.captioning.captioner import load_captioner
from pretrain.methods.captioning.decoding import Decoded, build_decode
from pretrain.methods.captioning.pictures import (
    PANEL,
    PictureFolder,
    attention_picture,
    caption_pictures,
    join_pieces,
)
from pretrain.methods.method import build_method
from tests.pretrain.tiny_run import tiny_config, write_run
from virtex_d2.engine.errors import InputError


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
    return load_captioner(str(write_run(tmp_path_factory.mktemp("pictures") / "run")), device="cpu")


def decoded(captioner, text, end=True):
    tokens = captioner.tokenizer.encode(text) + [2] * end
    maps = torch.rand(len(tokens), 2, 3, generator=torch.Generator().manual_seed(0))
    return Decoded(tokens, -1.0, maps / maps.sum((1, 2), keepdim=True))


def grey(size=(300, 200)):
    return Image.new("RGB", size, (128, 128, 128))


def test_pieces_are_joined_to_words_and_their_attention_averaged(captioner):
    caption = decoded(captioner, "a beach sandstone")
    words, maps = join_pieces(captioner.tokenizer, caption)
    assert words == ["a", "beach", "sandstone"]
    pieces = captioner.tokenizer.pieces(caption.tokens[:-1])
    first = max(i for i, piece in enumerate(pieces) if piece.startswith("\u2581"))
    assert first < len(pieces) - 1  # the last word has several pieces
    expected = caption.attention[first : len(pieces)].mean(0).numpy()
    np.testing.assert_allclose(maps[-1], expected, rtol=1e-6)


def test_a_caption_that_begins_inside_a_word_has_that_word(captioner):
    inner = next(i for i in range(4, 70) if captioner.tokenizer.pieces([i])[0][0] != "\u2581")
    caption = Decoded([inner, 2], 0.0, torch.full((2, 1, 1), 1.0))
    assert join_pieces(captioner.tokenizer, caption)[0] == captioner.tokenizer.pieces([inner])


def test_attention_shows_where_it_is_and_upright(captioner):
    """Low attention stays dark, and rows of the map are rows of the picture."""
    tokens = captioner.tokenizer.encode("a")[:1]
    maps = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]])
    picture = attention_picture(
        grey((PANEL, PANEL)), captioner.tokenizer, Decoded(tokens, 0, maps), "a"
    )
    panel = np.asarray(picture, float).mean(-1)[-PANEL - 14 : -14, -PANEL - 14 : -14]
    third = PANEL // 3
    corners = [panel[:third, :third], panel[:third, -third:], panel[-third:, :third]]
    assert corners[0].mean() > corners[1].mean() + 30
    assert corners[0].mean() > corners[2].mean() + 30


@pytest.mark.parametrize("size", [(640, 480), (60, 400), (50, 50)])
@pytest.mark.parametrize("words", [0, 1, 7, 29])
def test_pictures_of_any_size_hold_any_number_of_words(captioner, size, words):
    text = " ".join(["beach"] * words)
    picture = attention_picture(grey(size), captioner.tokenizer, decoded(captioner, text), text)
    columns = (picture.width - 14) // (PANEL + 14)
    rows = picture.height // (PANEL + 30)
    assert columns <= 6
    assert words + 1 <= columns * rows < words + 1 + columns


def test_an_endless_word_stays_inside_its_panel_and_the_caption(captioner):
    word = "rhinoceros" * 12
    caption = decoded(captioner, word)
    picture = attention_picture(grey(), captioner.tokenizer, caption, f"{word} {word}")
    columns = np.asarray(picture).astype(int).min(axis=(0, 2))
    assert (columns[:4] == 255).all()  # nothing runs into the margins
    assert (columns[-4:] == 255).all()


def test_files_of_one_name_in_two_folders_get_a_picture_each(captioner, tmp_path):
    files = [tmp_path / "a" / "photo.png", tmp_path / "b" / "photo.jpg"]
    for file in files:
        file.parent.mkdir()
        grey().save(file)
    folder = PictureFolder(str(tmp_path / "looks"))
    decode = build_decode("greedy", with_attention=True)
    paths = [
        folder.save(result.file, captioner.tokenizer, result.decoded, result.caption)
        for result in captioner.caption_files(map(str, files), decode, 2)
    ]
    assert paths == [str(tmp_path / "looks" / name) for name in ("photo.png", "photo-2.png")]
    assert all(Image.open(path).height > PANEL for path in paths)


def test_real_photographs_are_drawn(captioner, real_data, tmp_path):
    photographs = sorted((real_data / "coco" / "val2017").glob("*.jpg"))[:3]
    folder = PictureFolder(str(tmp_path))
    decode = build_decode("beam", with_attention=True)
    for result in captioner.caption_files(map(str, photographs), decode, 3):
        path = folder.save(result.file, captioner.tokenizer, result.decoded, result.caption)
        pixels = np.asarray(Image.open(path), float)
        assert pixels.std() > 10
        assert (pixels[:4] == 255).all()  # the margin stays white


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="no folder can be made"):
        PictureFolder(str(tmp_path / "file" / "looks"))


def samples(captioner, count):
    generator = torch.Generator().manual_seed(0)
    tokens = [1, *captioner.tokenizer.encode("two dogs play with a red ball"), 2]
    return [
        {
            "image": torch.randint(0, 256, (3, 64, 64), generator=generator).to(torch.uint8),
            "caption_tokens": torch.tensor(tokens),
            "image_id": 10 + number,
        }
        for number in range(count)
    ]


def test_tensorboard_gets_a_picture_for_each_sample_and_the_model_keeps_its_mode(captioner):
    from torch.utils.tensorboard.summary import image as image_summary

    model = captioner.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    try:
        pictures = caption_pictures(model, captioner.tokenizer, samples(captioner, 3))
        assert model.training
    finally:
        model.eval()
    assert [name for name, _ in pictures] == ["caption/10", "caption/11", "caption/12"]
    for name, picture in pictures:
        assert picture.dtype == np.uint8
        assert picture.shape[0] == 3
        assert picture.shape[2] == PANEL < picture.shape[1]
        image_summary(name, picture, dataformats="CHW")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_an_objective_that_cannot_caption_has_no_pictures(captioner):
    for objective in ("masked_lm", "backward_captioning", "token_classification"):
        assert build_method(tiny_config(objective), 70).pictures(val=None, count=1) == []
    assert caption_pictures(captioner.model, captioner.tokenizer, []) == []
