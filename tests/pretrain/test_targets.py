"""What objectives want of a sample besides image and caption: hidden words, classes, modes."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pretrain.config import get_pretrain_cfg
from pretrain.data.loader import Visit
from pretrain.data.records import CaptionRecord
from pretrain.methods.captioning.model import Captioning, MaskedLanguageModel
from pretrain.methods.captioning.samples import CaptionSamples, MaskedWords, ParallelPrediction
from pretrain.methods.classification.labels import (
    ImageLabels,
    LabelSamples,
    check_same_classes,
    entropy_of_labels,
)
from virtex_d2.engine.errors import InputError

VOCAB = 50


def extended(target, words: list[int], seed: int = 0) -> dict:
    tokens = torch.tensor([1, *words, 2])
    added = target(tokens, np.random.default_rng(seed))
    return {"caption_tokens": tokens, "position": 0, "failures": [], **added}


def collate(samples: list[dict]) -> dict:
    return CaptionSamples.collate(CaptionSamples, samples)


# Hidden words


@settings(max_examples=100)
@given(
    st.lists(st.integers(4, VOCAB - 1), max_size=28),
    st.integers(0, 2**32),
    st.floats(0.01, 1.0),
)
def test_a_share_of_the_words_is_hidden_and_never_sos_or_eos(words, seed, share):
    sample = extended(MaskedWords(VOCAB, share, 0.85, 0.1), words, seed)
    tokens, masked, labels = (
        sample[key] for key in ("caption_tokens", "masked_tokens", "masked_labels")
    )
    chosen = labels != 0
    assert int(chosen.sum()) == math.ceil(share * len(words))
    assert torch.equal(labels[chosen], tokens[chosen])
    assert torch.equal(masked[~chosen], tokens[~chosen])
    assert not chosen[0]
    assert not chosen[-1]
    assert masked.min() >= 1
    assert masked.max() < VOCAB
    assert tokens.tolist() == [1, *words, 2], "the caption itself was changed"


def test_hidden_words_become_mask_random_or_stay_as_often_as_the_recipe_says():
    target = MaskedWords(10_000, 1.0, 0.85, 0.1)
    words = [7] * 28
    rows = [extended(target, words, seed)["masked_tokens"][1:-1] for seed in range(300)]
    tokens = torch.cat(rows)
    assert (tokens == 3).float().mean().item() == pytest.approx(0.85, abs=0.02)
    assert (tokens == 7).float().mean().item() == pytest.approx(0.05, abs=0.015)
    others = tokens[(tokens != 3) & (tokens != 7)]
    assert others.min() >= 4
    assert others.max() > 9000


@pytest.mark.parametrize("shares", [(0.0, 0.85, 0.1), (0.15, 0.95, 0.1), (1.5, 0.5, 0.1)])
def test_shares_that_are_none_are_refused(shares):
    with pytest.raises(InputError, match=r"MODEL\.MASKED_LM"):
        MaskedWords(VOCAB, *shares)


def test_a_batch_pads_what_targets_add():
    target = MaskedWords(VOCAB, 0.5, 1.0, 0.0)
    batch = collate([extended(target, [5, 6, 7, 8]), extended(target, [9])])
    assert batch["masked_tokens"].shape == batch["masked_labels"].shape == (2, 6)
    assert batch["masked_tokens"][1].tolist() == [1, 3, 2, 0, 0, 0]
    assert batch["masked_labels"][1].tolist() == [0, 9, 0, 0, 0, 0]


def test_so_many_samples_are_predicted_at_once_as_the_share_says():
    target = ParallelPrediction(0.25)
    drawn = [bool(extended(target, [5], seed)["parallel"]) for seed in range(2000)]
    assert np.mean(drawn) == pytest.approx(0.25, abs=0.03)
    batch = collate([extended(target, [5], seed) for seed in range(8)])
    assert batch["parallel"].tolist() == drawn[:8]


def test_objectives_get_the_targets_they_read():
    cfg = get_pretrain_cfg()
    assert Captioning.targets(cfg, VOCAB) == []
    cfg.MODEL.CAPTIONING.PARALLEL_SHARE = 0.5
    assert isinstance(Captioning.targets(cfg, VOCAB)[0], ParallelPrediction)
    assert isinstance(MaskedLanguageModel.targets(cfg, VOCAB)[0], MaskedWords)


# Classes of the image


def instances(**changes) -> dict:
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in (3, 4, 5)],
        "categories": [{"id": 90, "name": "kite"}, {"id": 7, "name": "cat"}],
        "annotations": [
            {"image_id": 3, "category_id": 90},
            {"image_id": 3, "category_id": 7},
            {"image_id": 3, "category_id": 7},
            {"image_id": 5, "category_id": 90},
        ],
    }
    return {**content, **changes}


@pytest.fixture
def write(tmp_path):
    def write(content: dict):
        path = tmp_path / "instances.json"
        path.write_text(json.dumps(content))
        return path

    return write


def test_labels_are_matched_by_file_name_and_may_be_none(write):
    names = ["/data/5.jpg", "/data/4.jpg", "elsewhere/3.jpg", "/data/unlisted.jpg"]
    labels = ImageLabels(write(instances()), names)
    assert labels.class_names == ["cat", "kite"]
    assert [labels[i].tolist() for i in range(len(labels))] == [[1], [], [0, 1], []]
    assert (labels.num_unlabelled, labels.num_unlisted) == (2, 1)


def test_labels_and_a_view_are_the_sample_of_an_image_that_needs_no_caption(write):
    cfg = get_pretrain_cfg()
    cfg.DATA.IMAGE_SIZE, cfg.DATA.VAL_LABELS = 8, str(write(instances()))
    records = [CaptionRecord(i, f"/data/{i}.jpg", ()) for i in (5, 4, 3, 9)]
    samples = LabelSamples(cfg, [], records)
    assert samples.num_outputs == 2
    image = Image.new("RGB", (12, 9))
    made = [samples.val(Visit(r, i, image, i, 0)) for i, r in enumerate(records)]
    whole = [{**one, "position": 0, "failures": []} for (one,) in made]
    batch = samples.collate(whole)
    assert batch["labels"].tolist() == [[1, -1], [-1, -1], [0, 1], [-1, -1]]
    assert batch["image"].shape == (4, 3, 8, 8)
    cfg.DATA.TRAIN_CAPTIONS = "pipe:cat a.tar"
    with pytest.raises(InputError, match="a.tar is read from pipes, for whose images no labels"):
        LabelSamples(cfg, None, records)


def test_the_baseline_of_labels_is_what_the_best_constant_answer_costs(write):
    labels = ImageLabels(write(instances()), ["3.jpg", "4.jpg", "5.jpg"])
    # rows {cat, kite} and {kite}: the mean shares are 1/4 and 3/4
    expected = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert entropy_of_labels(labels[i] for i in range(3)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"categories": None}, "`categories`.*instances_train2017"),
        ({"images": [{"id": 3}]}, "lacks 'file_name'"),
        ({"annotations": [{"image_id": 3}]}, "lacks 'category_id'"),
        ({"annotations": [{"image_id": 3, "category_id": 8}]}, "category ids \\[8\\]"),
        ({"images": [{"id": i, "file_name": "3.jpg"} for i in (3, 4)]}, "given twice"),
        ({"images": [{"id": 3, "file_name": "other.jpg"}]}, "none of the 1 .* 3.jpg.*other.jpg"),
    ],
)
def test_labels_that_do_not_fit_are_refused_by_what_they_lack(write, changes, message):
    path = write(instances(**changes))
    with pytest.raises(InputError, match=message) as caught:
        ImageLabels(path, ["3.jpg"])
    assert str(path) in str(caught.value)


def test_training_and_validation_labels_must_have_the_same_classes(write):
    train = ImageLabels(write(instances()), ["3.jpg"])
    other = [{"id": 90, "name": "kite"}, {"id": 7, "name": "dog"}]
    val = ImageLabels(write(instances(categories=other)), ["3.jpg"])
    with pytest.raises(InputError, match="cat, dog"):
        check_same_classes(train, val, "val.json")
