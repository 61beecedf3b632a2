import io
import shutil

import pytest
import torch
from PIL import Image

from pretrain.methods.captioning.captioner import list_images, load_captioner
from pretrain.methods.captioning.decoding import build_decode
from pretrain.methods.captioning.tokenizer import train_tokenizer
from tests.pretrain.tiny_run import CAPTIONS, VOCAB, write_run
from virtex_d2.engine.errors import InputError


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("captioner") / "run")


@pytest.fixture
def run(written, tmp_path):
    """A copy, to be damaged."""
    return shutil.copytree(written, tmp_path / "run")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    generator = torch.Generator().manual_seed(0)
    for number, size in enumerate([(90, 70), (64, 100), (200, 120), (64, 64)]):
        pixels = torch.randint(0, 256, (size[1] // 8, size[0] // 8, 3), generator=generator)
        image = Image.fromarray(pixels.to(torch.uint8).numpy()).resize(size)
        image.save(folder / f"{number}.png")
    return sorted(map(str, folder.iterdir()))


def test_a_runs_folder_its_checkpoint_and_a_bare_state_dict_give_the_same_captions(
    run, photographs, tmp_path
):
    state = torch.load(run / "model_final.pth", weights_only=True)["model"]
    torch.save(state, tmp_path / "virtex.pth")
    arguments = [
        (str(run),),
        (str(run / "model_final.pth"),),
        (str(tmp_path / "virtex.pth"), str(run / "config.yaml"), str(run / "tokenizer.model")),
    ]
    decode = build_decode("beam", beam_size=3)
    captions = [
        [(r.caption, r.decoded.tokens) for r in captioner.caption_files(photographs, decode, 2)]
        for captioner in (load_captioner(*paths, device="cpu") for paths in arguments)
    ]
    assert captions[0] == captions[1] == captions[2]
    assert len(captions[0]) == 4
    assert all(tokens for _, tokens in captions[0])


@pytest.mark.parametrize("method", ["beam", "greedy", "nucleus"])
def test_captions_do_not_depend_on_the_batch_size(method, written, photographs):
    captioner = load_captioner(str(written), device="cpu")
    captions = []
    for batch_size in (1, 3, 16):
        decode = build_decode(method, seed=4)
        results = captioner.caption_files(photographs, decode, batch_size)
        captions.append([(result.file, result.decoded.tokens) for result in results])
    assert captions[0] == captions[1] == captions[2]


def test_a_file_that_cannot_be_decoded_keeps_its_place_and_says_why(written, photographs, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    files = [photographs[0], str(broken), str(tmp_path / "absent.jpg"), photographs[1]]
    captioner = load_captioner(str(written), device="cpu")
    results = list(captioner.caption_files(files, build_decode("greedy"), 2))
    assert [result.file for result in results] == files
    assert [bool(result.error) for result in results] == [False, True, True, False]
    assert results[2].error == "No such file or directory"


def test_a_checkpoint_of_data_parallel_training_loads(run):
    checkpoint = torch.load(run / "model_final.pth", weights_only=True)
    checkpoint["model"] = {f"module.{name}": t for name, t in checkpoint["model"].items()}
    torch.save(checkpoint, run / "model_final.pth")
    assert load_captioner(str(run), device="cpu").tokenizer.vocab_size == VOCAB


def test_a_run_that_recomputed_norms_which_training_no_longer_does_still_captions(run):
    config = (run / "config.yaml").read_text()
    assert "RECOMPUTE: ''" in config
    (run / "config.yaml").write_text(config.replace("RECOMPUTE: ''", "RECOMPUTE: norms"))
    assert load_captioner(str(run), device="cpu").tokenizer.vocab_size == VOCAB


def test_a_vocabulary_that_does_not_fit_is_refused_with_both_sizes(run):
    train_tokenizer(CAPTIONS, VOCAB - 10, run / "tokenizer.model")
    with pytest.raises(InputError, match=r"60 pieces, the model in .*model_final.pth 70"):
        load_captioner(str(run), device="cpu")


def test_other_sizes_than_the_configs_are_refused(run):
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("HIDDEN_SIZE: 32", "HIDDEN_SIZE: 64"))
    with pytest.raises(InputError, match=r"tensors differ"):
        load_captioner(str(run), device="cpu")


@pytest.mark.parametrize("objective", ["masked_lm", "token_classification", "backward_captioning"])
def test_an_objective_that_cannot_caption_is_refused(run, objective):
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("bicaptioning", objective))
    with pytest.raises(InputError, match=f"MODEL.OBJECTIVE {objective} cannot caption"):
        load_captioner(str(run), device="cpu")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model_final.pth", "found no checkpoint model_final.pth in it"),
        ("config.yaml", "config.yaml.*--config-file"),
        ("tokenizer.model", "tokenizer.model.*--tokenizer"),
    ],
)
def test_a_missing_file_is_named_with_what_to_do(run, name, message):
    (run / name).unlink()
    with pytest.raises(InputError, match=message):
        load_captioner(str(run), device="cpu")


def test_a_checkpoint_that_is_not_there_or_holds_objects_is_refused(run, tmp_path):
    with pytest.raises(InputError, match="nothing.pth: expected a file"):
        load_captioner(str(tmp_path / "nothing.pth"))
    torch.save({"model": build_decode}, run / "model_final.pth")
    with pytest.raises(InputError, match="refused, because besides tensors it holds Python"):
        load_captioner(str(run), device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(run):
    with pytest.raises(InputError, match="Device cuda: no CUDA device"):
        load_captioner(str(run), device="cuda")


def test_the_tokenizer_that_the_config_names_comes_before_the_folders(run, tmp_path):
    other = tmp_path / "given.model"
    shutil.move(run / "tokenizer.model", other)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("TOKENIZER: ''", f"TOKENIZER: '{other}'"))
    assert load_captioner(str(run), device="cpu").tokenizer.vocab_size == VOCAB


def test_images_are_listed_file_by_file_folder_by_folder_and_from_standard_input(tmp_path):
    for name in ("b/2.JPG", "b/1.png", "b/deep/0.jpeg", "b/notes.txt", "a.dat"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    stdin = io.StringIO("x y.jpg\n\nz.jpg")
    found = list(list_images([str(tmp_path / "b"), "-", str(tmp_path / "a.dat")], stdin))
    inside = [str(tmp_path / "b" / name) for name in ("1.png", "2.JPG", "deep/0.jpeg")]
    assert found == [*inside, "x y.jpg", "z.jpg", str(tmp_path / "a.dat")]


def test_folders_are_listed_through_links_and_what_is_left_out_is_named(tmp_path, caplog):
    for name in ("a/1.jfif", "a/x.dat", "a/.hidden/2.jpg", "pool/3.avif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a" / "link").symlink_to(tmp_path / "pool")
    found = list(list_images([str(tmp_path / "a")], io.StringIO()))
    assert found == [str(tmp_path / "a" / name) for name in ("1.jfif", "link/3.avif")]
    assert "x.dat" in caplog.text


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(InputError, match="has no image"):
        list(list_images([str(tmp_path)], io.StringIO()))


def test_settings_out_of_range_are_refused(written, photographs):
    captioner = load_captioner(str(written), device="cpu")
    with pytest.raises(InputError, match="Batch size 0"):
        list(captioner.caption_files(photographs, build_decode("greedy"), 0))
    with pytest.raises(InputError, match="40 words a caption: the model has 8 positions"):
        list(captioner.caption_files(photographs, build_decode("greedy", max_words=40), 1))
    with pytest.raises(InputError, match="'best' is not one of"):
        build_decode("best")
