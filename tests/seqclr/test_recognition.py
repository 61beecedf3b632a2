"""Recognisers: decoders' losses and readings, runs of the engine, what is refused, reading."""

import csv
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data.datasets import load_coco_json
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from pretrain.config import load_pretrain_config
from pretrain.methods.method import find_method
from pretrain.methods.seqclr.decoders import (
    Alphabet,
    AttentionDecoder,
    CTCDecoder,
    frames_needed,
)
from pretrain.methods.seqclr.encoder import load_encoder, read_encoder
from pretrain.methods.seqclr.main import check_words, read_words
from pretrain.methods.seqclr.reading import load_reader
from pretrain.methods.seqclr.rendered import (
    LIST,
    draw_page,
    draw_word,
    random_words,
    write_pages,
    write_words,
)
from pretrain.methods.seqclr.scores import compared, score_words
from pretrain.methods.seqclr.words import open_words, word_pixels
from pretrain.trainer import PretrainTrainer
from pretrain.transforms import normalize
from tests.pretrain.tiny_run import write_run
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import read_safetensors, write_safetensors
from virtex_d2.engine.frozen import fingerprint
from virtex_d2.engine.images import read_image

LETTERS = "abc"
ROOT = Path(__file__).resolve().parents[2]


# Decoders


def paths(log_probs, labels, blank=0):
    """Sum over all paths, one by one: minus the log-likelihood that CTC's recursion gives."""
    frames, classes = log_probs.shape
    total = 0.0
    for path in itertools.product(range(classes), repeat=frames):
        kept = [k for k, _ in itertools.groupby(path) if k != blank]
        if kept == list(labels):
            total += math.exp(sum(log_probs[t, k] for t, k in enumerate(path)))
    return -math.log(total)


@pytest.mark.parametrize("words", [["ab", "c"], ["aa", ""]])
def test_ctc_sums_over_all_paths(words):
    torch.manual_seed(0)
    alphabet = Alphabet(LETTERS)
    decoder, frames = CTCDecoder(5, alphabet), torch.randn(2, 4, 5)
    rows = [alphabet.encode(word) for word in words]
    labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    log_probs = decoder.predict(frames).log_softmax(2).tolist()
    expected = [
        paths(torch.tensor(p), row.tolist()) / max(len(row), 1) for p, row in zip(log_probs, rows)
    ]
    assert decoder.loss(frames, labels).item() == pytest.approx(sum(expected) / 2, rel=1e-5)


def test_a_word_without_a_path_costs_nothing():
    alphabet = Alphabet(LETTERS)
    decoder, frames = CTCDecoder(5, alphabet), torch.randn(1, 3, 5, requires_grad=True)
    loss = decoder.loss(frames, alphabet.encode("aab")[None])  # needs four frames
    loss.backward()
    assert loss.item() == 0
    assert frames.grad.abs().sum() == 0


def test_ctc_reads_what_is_left_without_repeats_and_blanks():
    decoder = CTCDecoder(4, Alphabet(LETTERS))
    with torch.no_grad():
        decoder.output.weight.copy_(torch.eye(4))
        decoder.output.bias.zero_()
    path = [0, 1, 1, 0, 1, 2, 2, 3, 0]
    frames = 2 * torch.nn.functional.one_hot(torch.tensor(path), 4)[None].float()
    (reading,) = decoder.read(frames)
    share = math.exp(2) / (math.exp(2) + 3)
    assert reading.text == "aabc"
    assert reading.confidence == pytest.approx(share ** len(path), rel=1e-4)


def test_attention_is_the_mean_over_words_of_what_each_symbol_costs():
    torch.manual_seed(0)
    alphabet = Alphabet(LETTERS)
    decoder, frames = AttentionDecoder(5, alphabet, hidden=6, max_length=4), torch.randn(2, 7, 5)
    labels = torch.tensor([[1, 3, 2], [2, 0, 0]])  # "acb", "b"
    alone = [decoder.loss(frames[:1], labels[:1]), decoder.loss(frames[1:], labels[1:, :1])]
    assert decoder.loss(frames, labels).item() == pytest.approx(sum(alone).item() / 2, rel=1e-5)
    # by hand: the cell of the first step knows [GO], that of the second the letter
    cell, state = decoder.attention_cell, (torch.zeros(1, 6), torch.zeros(1, 6))
    cost = 0.0
    for before, wanted in ((0, 3), (3, 1)):  # [GO] -> b -> [s]
        query = cell.h2h(state[0])
        scores = cell.score(torch.tanh(cell.i2h(frames[1]) + query)).squeeze(1)  # (T,)
        context = (scores.softmax(0)[:, None] * frames[1]).sum(0)
        symbol = torch.eye(5)[before]
        state = cell.rnn(torch.cat([context, symbol])[None], state)
        cost -= decoder.generator(state[0]).log_softmax(1)[0, wanted].item() / 2
    assert alone[1].item() == pytest.approx(cost, rel=1e-5)


@pytest.mark.parametrize("kind", [CTCDecoder, AttentionDecoder])
def test_a_decoder_learns_words_from_frames_that_say_them(kind):
    """Every pair of letters, doubled ones too; one-hot frames, a blank between two of them."""
    torch.manual_seed(0)
    alphabet = Alphabet(LETTERS)
    words = ["".join(pair) for pair in itertools.product(LETTERS, repeat=2)]
    rows = torch.stack([alphabet.encode(word) for word in words])
    spread = torch.stack([rows[:, 0], rows[:, 0] * 0, rows[:, 1]], dim=1)
    places = torch.eye(3).expand(9, 3, 3)  # attention knows no order
    frames = torch.cat([torch.nn.functional.one_hot(spread, 4), places], dim=2)
    decoder = kind(7, alphabet, **({"hidden": 16} if kind is AttentionDecoder else {}))
    optimizer = torch.optim.Adam(decoder.parameters(), 0.03)
    for _ in range(200):
        optimizer.zero_grad()
        decoder.loss(frames, rows).backward()
        optimizer.step()
    assert [reading.text for reading in decoder.read(frames)] == words


def test_decoders_compute_in_float32_under_autocast():
    alphabet, frames = Alphabet(LETTERS), torch.randn(2, 6, 8)
    labels = torch.tensor([[1, 2], [3, 0]])
    for decoder in (CTCDecoder(8, alphabet, "bilstm"), AttentionDecoder(8, alphabet)):
        plain = decoder.loss(frames.bfloat16().float(), labels)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(decoder.loss(frames.bfloat16(), labels), plain)


def test_frames_that_ctc_needs_count_repeats():
    assert [frames_needed(word) for word in ("", "a", "aa", "hello", "aaa")] == [0, 1, 3, 6, 5]


@pytest.mark.parametrize("letters", ["", "aba"])
def test_an_alphabet_has_each_letter_once(letters):
    with pytest.raises(InputError, match="expected letters, each once"):
        Alphabet(letters)


# Scores


def edits(a, b):
    """Levenshtein's distance, plainly."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[:], i
        for j, y in enumerate(b, 1):
            row[j] = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (x != y))
    return row[-1]


texts = st.text("abc", max_size=5)


@given(pairs=st.lists(st.tuples(texts, texts), min_size=1, max_size=5))
def test_scores_are_those_of_the_plain_definitions(pairs):
    found, distances = score_words(pairs), [edits(a, b) for a, b in pairs]
    count, letters = len(pairs), sum(len(a) for a, _ in pairs)
    assert found.words == count
    assert found.word_accuracy == pytest.approx(sum(d == 0 for d in distances) / count)
    assert found.ed1 == pytest.approx(sum(d <= 1 for d in distances) / count)
    assert found.cer == pytest.approx(sum(distances) / letters, nan_ok=True) if letters else True
    ned = [1 - d / max(len(a), len(b)) if a and b else 0.0 for d, (a, b) in zip(distances, pairs)]
    assert found.one_minus_ned == pytest.approx(sum(ned) / count)


def test_what_counts_of_a_text():
    cfg = load_pretrain_config(None, ["MODEL.OBJECTIVE", "word_recognition"])
    assert compared("Kids' Caf\u00e9 7", cfg) == "kidscaf7"
    cfg.EVAL.CASE, cfg.EVAL.CHARSET = "keep", ""
    assert compared("Kids' Caf\u00e9 7", cfg) == "Kids' Caf\u00e9 7"


# Rendered words


def test_rendered_words_are_nested_and_of_their_styles(tmp_path):
    few, more = (list(random_words(count, 3)) for count in (5, 8))
    assert [word for word, _ in few] == [word for word, _ in more][:5]
    path = write_words(tmp_path / "a", 8, 3)
    lines = path.read_text().splitlines()
    assert [line.split("\t")[1] for line in lines] == [word for word, _ in more]
    plain, styled = (
        [draw_word(word, rng, style) for word, rng in random_words(12, 0)]
        for style in (False, True)
    )
    assert all(image.histogram()[200:].count(0) < 56 for image in plain)
    corners = [image.getpixel((1, 1)) for image in styled]
    assert min(corners) < 100 < 180 < max(corners)  # light on dark, and dark on light
    with pytest.raises(InputError, match="exists already"):
        write_words(tmp_path / "a", 8, 3)


def test_the_polygons_of_a_page_hold_all_its_ink_and_little_else():
    """What a gradient and noise do not explain lies within them, and reaches all four sides."""
    for seed in range(5):
        page, outlines = draw_page(np.random.default_rng(seed), clutter=0)
        gray, (y, x) = np.asarray(page, float), np.mgrid[:192, :192]
        within = Image.new("1", page.size)
        for outline in outlines:
            ImageDraw.Draw(within).polygon([tuple(point) for point in outline + 0.5], fill=1)
        outside = ~np.asarray(within)
        plane = np.stack([x, y, np.ones_like(x)], axis=-1).astype(float)
        fitted = plane @ np.linalg.lstsq(plane[outside], gray[outside], rcond=None)[0]
        ink = np.abs(gray - fitted) > 24  # six deviations of the noise
        assert not ink[outside].any()
        for outline in outlines:
            origin, (along, down) = outline[0], (outline[1] - outline[0], outline[3] - outline[0])
            offset = np.stack([x, y], axis=-1)[ink] + 0.5 - origin
            u, v = offset @ along / (along @ along), offset @ down / (down @ down)
            own = (u > 0) & (u < 1) & (v > 0) & (v < 1)
            # a margin of one pixel, and what is faint at the letters' edges
            for share, side in ((u[own], along), (v[own], down)):
                reach = np.array([share.min(), 1 - share.max()]) * np.linalg.norm(side)
                assert (reach < 4).all()


def test_pages_are_a_set_in_cocos_format(tmp_path):
    path = write_pages(tmp_path, "train", 3, 7)
    content = load_coco_json(str(path), str(tmp_path / "train"))
    drawn = [draw_page(np.random.default_rng([7, number])) for number in (1, 2, 3)]
    assert [len(image["annotations"]) for image in content] == [len(part) for _, part in drawn]
    for image, (page, outlines) in zip(content, drawn):
        assert np.array_equal(np.asarray(Image.open(image["file_name"])), np.asarray(page))
        for annotation, outline in zip(image["annotations"], outlines):
            assert annotation["segmentation"][0] == pytest.approx(outline.ravel(), abs=0.01)
            x, y, width, height = annotation["bbox"]
            assert (x, y) == pytest.approx(outline.min(0), abs=0.01)
            assert (x + width, y + height) == pytest.approx(outline.max(0), abs=0.02)
    with pytest.raises(InputError, match="exists already"):
        write_pages(tmp_path, "train", 3, 7)
    with pytest.raises(InputError, match="expected 1 or more"):
        write_pages(tmp_path, "test", 0, 7)


# Runs

CONFIG = """\
MODEL: {OBJECTIVE: word_recognition, DEVICE: cpu, VISUAL: {NAME: resnet18}}
DATA: {WORD_SIZE: [16, 48], NUM_WORKERS: 0}
DECODER: {NAME: %s, ALPHABET: abcdefghkmnt, HIDDEN_SIZE: 16, MAX_LENGTH: 6}
SOLVER: {OPTIMIZER: adamw, BASE_LR: 0.005, CNN_LR: 0.001, IMS_PER_BATCH: 4, MAX_ITER: 4,
         WARMUP_ITERS: 1, CHECKPOINT_PERIOD: 2, AMP: {ENABLED: False}}
TEST: {IMS_PER_BATCH: 5, EVAL_PERIOD: 2, BEST_METRIC: val/word_accuracy}
LOG_PERIOD: 1
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_words(folder / "train", 12, 1, lengths=(2, 3))
    write_words(folder / "val", 7, 2, lengths=(2, 3))
    for decoder in ("ctc", "attention"):
        (folder / f"{decoder}.yaml").write_text(CONFIG % decoder)
    return folder


def config(world, output, *more, decoder="ctc"):
    sets = {key: str([str(world / part / LIST)]) for key, part in
            (("DATA.WORDS", "train"), ("DATA.VAL_WORDS", "val"))}  # fmt: skip
    given = {**sets, "OUTPUT_DIR": str(output), **dict(zip(more[::2], more[1::2]))}
    output.mkdir(exist_ok=True)
    opts = [part for pair in given.items() for part in pair]
    return load_pretrain_config(str(world / f"{decoder}.yaml"), opts)


def trained(*args, **options):
    trainer = PretrainTrainer(config(*args, **options))
    trainer.resume_or_load(resume=True)
    trainer.train()
    return trainer


def final(output):
    return torch.load(output / "model_final.pth", weights_only=True)["model"]


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """A finished run of CTC on a frozen encoder, and its fingerprint from before."""
    output = tmp_path_factory.mktemp("run") / "ctc"
    trainer = PretrainTrainer(config(world, output))
    trainer.resume_or_load(resume=True)
    before = fingerprint(trainer.method.encoder)
    decoder = fingerprint(trainer.method.decoder)
    trainer.train()
    assert fingerprint(trainer.method.decoder) != decoder
    return output, before, trainer


def test_a_frozen_encoder_stays_as_it_was(run):
    _, before, trainer = run
    assert fingerprint(trainer.method.encoder) == before
    assert not trainer.method.encoder.training
    assert trainer.method.decoder.training
    trainer.method.encoder.visual.cnn.bn1.running_mean.add_(1)
    try:
        with pytest.raises(RuntimeError, match="the frozen network has changed"):
            trainer.evaluate()
    finally:
        trainer.method.encoder.visual.cnn.bn1.running_mean.sub_(1)


def test_each_validation_leaves_what_was_read_and_how_well(run, world):
    output, _, _ = run
    with open(output / "predictions.tsv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, dialect="excel-tab"))
    labels = [line.split("\t")[1] for line in (world / "val" / LIST).read_text().splitlines()]
    assert [row["label"] for row in rows] == labels
    assert {row["set"] for row in rows} == {LIST}
    scores = json.loads((output / "scores.json").read_text())["all"]
    pairs = [(row["label"], row["read"]) for row in rows]
    assert scores["cer"] == pytest.approx(
        sum(edits(a, b) for a, b in pairs) / sum(map(len, labels))
    )
    assert [row["right"] for row in rows] == [str(int(a == b)) for a, b in pairs]
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    last = [line for line in lines if "val/word_accuracy" in line][-1]
    assert last["val/cer"] == pytest.approx(scores["cer"])
    assert (output / "recognizer_best.safetensors").exists()


@pytest.mark.parametrize("decoder", ["ctc", pytest.param("attention", marks=pytest.mark.slow)])
def test_a_run_that_is_stopped_goes_on_to_the_same_bits(world, tmp_path, run, decoder):
    """CTC on the frozen encoder; attention with all of it fine-tuned."""
    whole, more = run[0], ()
    if decoder == "attention":
        whole = tmp_path / "whole"
        more = ("ENCODER.FREEZE", "False", "DATA.VAL_WORDS", "[]", "TEST.BEST_METRIC", "")
        trained(world, whole, *more, decoder=decoder)
    stopped = PretrainTrainer(config(world, tmp_path / "b", *more, decoder=decoder))
    stopped.resume_or_load(resume=True)
    stopped.max_iter = 2
    stopped.train()
    trained(world, tmp_path / "b", *more, decoder=decoder)
    one, other = final(whole), final(tmp_path / "b")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (tmp_path / "b" / "backbone.safetensors").exists() == bool(more)
    if more:  # what was fine-tuned is handed over
        encoder, _ = read_encoder(str(tmp_path / "b" / "encoder.safetensors"))
        weight = one["encoder.visual.cnn.conv1.weight"]
        assert torch.equal(encoder.visual.cnn.conv1.weight, weight)


def test_several_sets_are_scored_each_and_unlabelled_shares_are_left_out(
    run, world, tmp_path, caplog
):
    lines = (world / "val" / LIST).read_text().splitlines()
    (world / "val" / "other.txt").write_text("\n".join([*lines[:3], lines[3].split("\t")[0]]))
    sets = str([str(world / "val" / LIST), str(world / "val" / "other.txt")])
    weights = str(run[0] / "model_final.pth")
    more = ("DATA.VAL_WORDS", sets, "DATA.MAX_SKIPPED_SHARE", "0.3", "MODEL.WEIGHTS", weights)
    trainer = PretrainTrainer(config(world, tmp_path / "a", *more), with_training_data=False)
    trainer.load_for_evaluation()
    results = trainer.evaluate()
    assert results["other.txt/words"] == 3
    assert (results["words"], results["words.txt/words"]) == (10, 7)
    assert "1 of 4 words have no label and are left out" in caplog.text


def test_evaluating_alone_gives_what_training_gave(run, world, tmp_path):
    output, _, _ = run
    expected = json.loads((output / "scores.json").read_text())
    for weights in ("model_final.pth", "recognizer.safetensors"):
        alone = config(world, tmp_path / weights, "MODEL.WEIGHTS", str(output / weights))
        trainer = PretrainTrainer(alone, with_training_data=False)
        trainer.load_for_evaluation()
        trainer.evaluate()
        assert json.loads((tmp_path / weights / "scores.json").read_text()) == expected


@pytest.mark.slow
def test_two_processes_read_what_one_does(run, world, tmp_path, run_python):
    output, _, _ = run
    given = ("DATA.VAL_WORDS", str([str(world / "val" / LIST)]), "OUTPUT_DIR", tmp_path / "two")
    done = run_python(
        *("tools/train_recognizer.py", "--eval-only", "--num-processes", 2),
        *("--config-file", world / "ctc.yaml", "MODEL.WEIGHTS", output / "model_final.pth"),
        *given,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    for name in ("scores.json", "predictions.tsv"):
        assert (tmp_path / "two" / name).read_text() == (output / name).read_text()


def test_an_encoder_is_started_from_a_file(run, world, tmp_path):
    output, _, _ = run
    weights = tmp_path / "resnet.pth"
    torch.manual_seed(7)
    donor = PretrainTrainer(config(world, tmp_path / "a", "SEED", "7")).method.encoder
    torch.save(donor.visual.cnn.state_dict(), weights)
    trainer = PretrainTrainer(config(world, tmp_path / "b", "ENCODER.WEIGHTS", str(weights)))
    assert fingerprint(trainer.method.encoder) != fingerprint(donor)
    trainer.resume_or_load(resume=True)
    load_encoder(donor, str(weights), trainer.cfg)
    assert fingerprint(trainer.method.encoder) == fingerprint(donor)
    both = ("MODEL.WEIGHTS", str(output / "model_final.pth"), "ENCODER.WEIGHTS", str(weights))
    trainer = PretrainTrainer(config(world, tmp_path / "c", *both))
    with pytest.raises(InputError, match=r"a whole recognizer, has an encoder\. Give one of them"):
        trainer.resume_or_load(resume=True)


def test_a_frozen_encoder_gathers_its_statistics_on_words(world, tmp_path, caplog):
    def start(*more):
        caplog.clear()
        trainer = PretrainTrainer(config(world, tmp_path / f"{len(more)}", *more))
        trainer.resume_or_load(resume=True)
        return trainer.method.encoder

    plain = start()
    assert "set ENCODER.STATISTICS_WORDS (1000)" in caplog.text
    encoder = start("ENCODER.STATISTICS_WORDS", "12")  # all there are
    assert "set ENCODER.STATISTICS_WORDS" not in caplog.text
    records = open_words(config(world, tmp_path / "0"), train=True)
    pixels = torch.stack([word_pixels(read_image(r.image_file()), (16, 48)) for r in records])
    with torch.no_grad():
        seen = encoder.visual.cnn.conv1(normalize(pixels))
    assert encoder.visual.cnn.bn1.running_mean.numpy() == pytest.approx(
        seen.mean((0, 2, 3)).numpy(), abs=1e-4
    )
    assert all(torch.equal(*pair) for pair in zip(plain.parameters(), encoder.parameters()))
    some = start("ENCODER.STATISTICS_WORDS", "4", "SEED", "0")
    with torch.no_grad():
        seen = encoder.visual.cnn.conv1(normalize(pixels[[0, 4, 7, 11]]))
    assert some.visual.cnn.bn1.running_mean.numpy() == pytest.approx(
        seen.mean((0, 2, 3)).numpy(), abs=1e-4
    )


# What is refused


def refused(world, tmp_path, said, *more, evaluate=False, **options):
    with pytest.raises(InputError) as caught:
        trainer = PretrainTrainer(config(world, tmp_path / "run", *more, **options), not evaluate)
        trainer.load_for_evaluation() if evaluate else trainer.resume_or_load(resume=True)
    for text in said:
        assert text in str(caught.value)


def words(folder, lines):
    """A list of words; all of one image."""
    Image.new("L", (40, 16), 200).save(folder / "a.png")
    (folder / "list.txt").write_text("".join(f"a.png\t{line}\n" for line in lines))
    return ("DATA.WORDS", str([str(folder / "list.txt")]))


def test_words_without_labels_are_not_for_decoders(world, tmp_path):
    given = words(tmp_path, ["", ""])
    refused(world, tmp_path, ["list.txt: none of its 2 words has a label", "tools/pretrain_net"],
            *given)  # fmt: skip
    given = words(tmp_path, ["ab", "", "ba"])
    refused(world, tmp_path, ["1 of its 3 words have an empty label or none", "a.png"], *given)
    given = ("DATA.WORDS", str([str(world / "train" / "images")]))
    refused(world, tmp_path, ["none of its 12 words has a label (read as images)"], *given)
    refused(world, tmp_path, ["DATA.WORDS is empty"], "DATA.WORDS", "[]")


def test_letters_outside_the_alphabet(world, tmp_path):
    given = words(tmp_path, ["ab", "za", "y"])
    said = ["list.txt: 2 of 3 words have letters that DECODER.ALPHABET has not", "'za' of"]
    said += ["these letters are 'yz'", "Set DECODER.ALPHABET to 'abcdefghkmntyz'"]
    refused(world, tmp_path, said, *given)
    trainer = PretrainTrainer(config(world, tmp_path / "run", *given, "DECODER.UNFIT", "skip"))
    assert [r.captions for r in trainer.data.train.records] == [("ab",)]
    given = words(tmp_path, ["z", "y"])
    refused(world, tmp_path, ["none of its words can be learnt"], *given, "DECODER.UNFIT", "skip")


def test_sets_of_different_alphabets(world, tmp_path):
    given = ("DATA.VAL_WORDS", words(tmp_path, ["ab", "\u0431\u0432"])[1])
    said = ["list.txt: 1 of 2 words have letters that DECODER.ALPHABET has not", "'\u0431\u0432'"]
    refused(world, tmp_path, said, *given, "EVAL.CHARSET", "")
    # letters that do not count are no reason
    PretrainTrainer(config(world, tmp_path / "run", *given))


def test_labels_longer_than_can_be_read(world, tmp_path):
    given = words(tmp_path, ["ab", "aabbaabb"])  # four pairs, of twelve frames
    PretrainTrainer(config(world, tmp_path / "a", *given))
    given = words(tmp_path, ["ab", "aabbaabba", "abcdefabcdef"])
    PretrainTrainer(config(world, tmp_path / "b", *given[:1], words(tmp_path, ["abcdefabcdef"])[1]))
    given = words(tmp_path, ["ab", "aabbaabba"])
    said = ["1 of 2 words are longer than can be read", "'aabbaabba' of", "gives 12 frames"]
    refused(world, tmp_path, said, *given)
    refused(world, tmp_path, ["DECODER.MAX_LENGTH is 6 letters"], *given, decoder="attention")


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("captions") / "run")


def test_checkpoints_that_are_no_recognizers(run, world, tmp_path, captions):
    caption = captions / "model_final.pth"
    said = ["expected a recognizer, as tools/train_recognizer.py writes it", "ENCODER.WEIGHTS"]
    for evaluate in (False, True):
        refused(world, tmp_path, said, "MODEL.WEIGHTS", str(caption), evaluate=evaluate)
    more = ("MODEL.WEIGHTS", str(run[0] / "model_final.pth"), "DECODER.ALPHABET", "abcdefghkmnx")
    said = ["reads the letters 'abcdefghkmnt'", "DECODER.ALPHABET is 'abcdefghkmnx'"]
    refused(world, tmp_path, said, *more, "DECODER.UNFIT", "skip", evaluate=True)


def test_a_run_goes_on_with_its_letters(run, world):
    with pytest.raises(InputError, match="ALPHABET"):
        other = ("DECODER.ALPHABET", "tnmkhgfedcba")
        PretrainTrainer(config(world, run[0], *other)).resume_or_load(resume=True)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("DECODER.NAME", "atention", "Did you mean 'attention'?"),
        ("DECODER.CASE", "upper", "is not one of lower, keep"),
        ("DECODER.UNFIT", "drop", "is not one of refuse, skip"),
        ("DECODER.CONTEXT", "lstm", "is not one of none, bilstm"),
        ("DECODER.MAX_LENGTH", "0", "expected 1 or more"),
        ("DECODER.ALPHABET", "abA", "has capital letters"),
        ("DECODER.AUGMENT.BLUR", "(2.0, 1.0)", "DECODER.AUGMENT.BLUR"),
        ("ENCODER.STATISTICS_WORDS", "-1", "expected 0, or with ENCODER.FREEZE True"),
        ("EVAL.CASE", "both", "is not one of lower, keep"),
        ("EVAL.CHARSET", "aA", "has capital letters"),
    ],
)
def test_values_that_cannot_be(world, tmp_path, key, value, said):
    refused(world, tmp_path, [key, said], key, value)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs/recognition").glob("*.yaml")), ids=lambda p: p.stem
)
def test_configs_build_what_their_names_say(path):
    cfg = load_pretrain_config(str(path), [])
    _, decoder, backbone = path.stem.split("_", 2)
    with torch.device("meta"):
        model = find_method(cfg)(cfg, len(cfg.DECODER.ALPHABET))
    assert isinstance(model.decoder, {"ctc": CTCDecoder, "attention": AttentionDecoder}[decoder])
    assert cfg.MODEL.VISUAL.NAME == backbone.replace("R_", "resnet")
    assert model.frozen
    assert cfg.DECODER.ALPHABET.isalnum() or cfg.EVAL.CHARSET == ""


# Reading


def test_words_are_read_as_in_the_validation(run, world, tmp_path, capsys):
    output, _, _ = run
    with open(output / "predictions.tsv", encoding="utf-8", newline="") as file:
        expected = [(r["read"], r["confidence"]) for r in csv.DictReader(file, dialect="excel-tab")]
    for images in (world / "val" / "images", world / "val" / LIST):
        assert read_words("", [str(output), str(images), "--batch-size", "3"]) == 0
        lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
        assert [tuple(line[1:]) for line in lines] == expected
        assert lines[0][0] == str(world / "val" / "images" / "000000.png")


def test_broken_images_are_named_and_the_rest_is_read(run, tmp_path, capsys):
    Image.new("L", (40, 16), 200).save(tmp_path / "b.png")
    (tmp_path / "a.png").write_bytes(b"no image")
    model = str(run[0] / "recognizer.safetensors")
    assert read_words("", [model, str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out.startswith(str(tmp_path / "b.png"))
    assert "a.png: cannot be decoded: it is no image" in err
    assert read_words("", [model, str(tmp_path / "b.png")]) == 0


def test_models_that_do_not_read_words(run, tmp_path, captions):
    with pytest.raises(InputError, match=r"found no recognizer\.safetensors in it"):
        load_reader(str(captions))
    with pytest.raises(InputError, match=r"expected recognizer\.safetensors of tools/train"):
        load_reader(str(captions / "model_final.pth"))
    tensors, metadata = read_safetensors(run[0] / "recognizer.safetensors")
    damaged = {
        "does not say what": {"config": "{}x"},
        "format_version": {"format_version": "0"},
        "its letters are not those": {
            "config": metadata["config"].replace("abcdefghkmnt", "tbcdefghkmna")
        },
        "tensors differ": {"config": metadata["config"].replace("resnet18", "resnet34")},
        "cannot be|does not say": {"config": json.dumps({"DECODER.NAME": 3})},
    }
    for said, change in damaged.items():
        write_safetensors(tmp_path / "x.safetensors", tensors, {**metadata, **change})
        with pytest.raises(InputError, match=said):
            load_reader(str(tmp_path / "x.safetensors"))


# Checking


def test_sets_are_checked_before_training(world, tmp_path, capsys):
    good = ["--words", str(world / "train" / LIST), "--val-words", str(world / "val" / LIST)]
    assert check_words("", [*good, "--workers", "2"]) == 0
    out = capsys.readouterr().out
    letters = {c for line in (world / "train" / LIST).read_text().splitlines()
               for c in line.split("\t")[1]}  # fmt: skip
    assert f"DECODER.ALPHABET {''.join(sorted(letters))!r}" in out
    assert "12 words, 12 with a label" in out
    assert "of 7 labels occur in" in out
    assert "PROBLEM" not in out


def test_what_is_wrong_with_sets_is_said(world, tmp_path, capsys):
    lines = (world / "val" / LIST).read_text().splitlines()[:3]
    folder = world / "val"
    (folder / "broken.png").write_bytes(b"no image")
    extra = [
        "broken.png\tab",
        f"{lines[0].split(chr(9))[0]}\t",
        f"{lines[0].split(chr(9))[0]}\taab",
    ]
    (folder / "bad.txt").write_text("\n".join([*lines, *extra]))
    try:
        arguments = ["--words", str(folder / LIST), "--val-words", str(folder / "bad.txt")]
        assert check_words("", [*arguments, "--width", "16"]) == 1
        out = capsys.readouterr().out
        assert "PROBLEM: 1 without a label" in out
        assert "PROBLEM: 1 cannot be decoded" in out
        assert "PROBLEM: 3 images are those of" in out
        assert "1 need more than the 4 frames of 16 pixels" not in out
        assert "2 images are there more than once" in out
        assert check_words("", [*arguments, "--no-images"]) == 1
        assert "cannot be decoded" not in capsys.readouterr().out
    finally:
        (folder / "bad.txt").unlink()
        (folder / "broken.png").unlink()
