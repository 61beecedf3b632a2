"""Packed records, fractions inside fractions, and mixtures that are functions of the position."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from detectron2.utils import comm
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config import get_pretrain_cfg
from pretrain.data.loader import build_train_loader
from pretrain.data.order import BLOCK, Epochs, Mixture, quotas
from pretrain.data.records import (
    CaptionRecord,
    MixedRecords,
    PackedText,
    Records,
    caption_counts,
    take_fraction,
)
from pretrain.data.sources import training_records
from pretrain.methods.captioning.samples import MaskedWords, ParallelPrediction
from pretrain.methods.captioning.tokenizer import Tokenizer, train_tokenizer
from tests.pretrain.caption_files import train_set, write_all
from virtex_d2.engine.errors import InputError

# more workers than cores are slow, and just what is to be tested
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=12)  # also half surrogates


def records_of(num_images: int, most_captions: int = 4) -> Records:
    captions = [[f"{i} {j}" for j in range(i % most_captions + 1)] for i in range(num_images)]
    return Records.of_files(
        range(num_images), [f"{i}.jpg" for i in range(num_images)], captions, "/"
    )


# Packed records


@given(
    st.lists(
        st.tuples(
            st.integers() | ANY_TEXT,
            ANY_TEXT.filter(lambda name: not name.startswith("/")),
            st.lists(ANY_TEXT, min_size=1, max_size=4),
        ),
        max_size=6,
    )
)
def test_records_come_out_as_they_went_in(rows):
    records = Records.of_files(*(zip(*rows) if rows else ([], [], [])), "/images")
    assert list(records) == [
        CaptionRecord(image_id, f"/images/{name}", tuple(captions))
        for image_id, name, captions in rows
    ]
    assert records.num_captions == sum(len(captions) for *_, captions in rows)
    assert caption_counts(records).tolist() == caption_counts(list(records)).tolist()


@given(st.lists(ANY_TEXT, max_size=6), st.data())
def test_packed_texts_are_taken_in_any_order(texts, data):
    indices = data.draw(
        st.lists(st.integers(0, len(texts) - 1), max_size=8) if texts else st.just([])
    )
    packed = PackedText.pack(texts)
    assert list(packed) == texts
    assert list(packed.take(np.array(indices, int))) == [texts[i] for i in indices]


def test_numbers_and_texts_as_ids_stay_apart():
    ids = [7, "7", 2**70, -1, ""]
    records = Records.of_files(ids, ["x"] * 5, [["a"]] * 5, "/")
    assert [record.image_id for record in records] == ids
    assert Records.of_files([7, -1], ["x"] * 2, [["a"]] * 2, "/").ids.dtype == np.int64


def test_records_beyond_the_last_raise_index_errors():
    for index in (3, -1):
        with pytest.raises(IndexError):
            records_of(3)[index]
        with pytest.raises(IndexError):
            MixedRecords([records_of(1), records_of(2)], [1, 1])[index]


# Fractions


def content(records: Records) -> dict[int, set[str]]:
    return {record.image_id: set(record.captions) for record in records}


@settings(max_examples=60)
@given(
    num_images=st.integers(1, 40),
    fractions=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted),
    captions=st.tuples(st.integers(1, 5), st.integers(1, 5)).map(sorted),
    seed=st.integers(0, 2**32),
)
def test_smaller_sets_lie_inside_larger_ones(num_images, fractions, captions, seed):
    records = records_of(num_images)
    whole = content(records)
    sets = []
    for fraction, count in zip(fractions, captions):
        expected = round(fraction * num_images)
        if expected == 0:
            with pytest.raises(InputError, match=r"DATA\.FRACTION"):
                take_fraction(records, fraction, count, seed)
            return
        subset = take_fraction(records, fraction, count, seed)
        assert len(subset) == expected
        sets.append(content(subset))
        assert list(sets[-1]) == sorted(sets[-1])  # the file's order
        for image_id, texts in sets[-1].items():
            assert texts <= whole[image_id]
            assert len(texts) == min(count, len(whole[image_id]))
    smaller, larger = sets
    assert all(smaller[image_id] <= larger[image_id] for image_id in smaller)


def test_captions_that_are_kept_do_not_depend_on_the_fraction_and_keep_their_order():
    records = records_of(200)
    all_images = content(take_fraction(records, 1.0, 2))
    few = take_fraction(records, 0.1, 2)
    assert all(set(r.captions) == all_images[r.image_id] for r in few)
    assert all(list(r.captions) == sorted(r.captions) for r in few)
    assert content(take_fraction(records, 0.1)) == {
        r.image_id: set(records[r.image_id].captions) for r in few
    }
    drawn = Counter(r.captions[0].split()[1] for r in take_fraction(records, 1.0, 1))
    assert min(drawn.values()) > 10  # not always the first caption


def test_subsets_of_other_seeds_differ_and_the_whole_is_the_records_themselves():
    records = records_of(100)
    assert content(take_fraction(records, 0.1, 0, 0)) != content(take_fraction(records, 0.1, 0, 1))
    assert take_fraction(records, 1.0, 0, 5) is records


@pytest.mark.parametrize("wrong", [(0.0, 0), (-0.1, 0), (1.1, 0), (float("nan"), 0), (1.0, -1)])
def test_sizes_of_no_subset_are_refused_by_key(wrong):
    with pytest.raises(InputError, match=r"DATA\."):
        take_fraction(records_of(10), *wrong)


def test_a_fraction_keeps_images_of_shards_readable(tmp_path):
    cfg = config(write_all(tmp_path)["webdataset"], tmp_path)
    whole = {record.image_id: record for record in training_records(cfg)}
    cfg.DATA.FRACTION = 0.6
    half = training_records(cfg)
    assert len(half) == 3
    assert all(record == whole[record.image_id] for record in half)


# Mixtures


WEIGHTS = st.lists(st.floats(0.01, 100), min_size=1, max_size=5)


@settings(max_examples=40)
@given(weights=WEIGHTS, sizes=st.data(), seed=st.integers(0, 2**20), start=st.integers(0, 10**7))
def test_a_mixture_is_a_function_of_the_position(weights, sizes, seed, start):
    sizes = [sizes.draw(st.integers(1, 50)) for _ in weights]
    try:
        used = Mixture(sizes, weights, seed)
    except InputError:
        assert min(weights) / sum(weights) < 1 / BLOCK
        return
    found = [next(used.candidates(position)) for position in range(start, start + 20)]
    for position in (start + 13, start, start + 19):
        fresh = Mixture(sizes, weights, seed)
        assert next(fresh.candidates(position)) == found[position - start]


@given(weights=WEIGHTS)
def test_shares_are_exact_to_a_position(weights):
    try:
        counts = quotas(weights)
    except InputError:
        return
    assert sum(counts) == BLOCK
    assert all(
        abs(n - BLOCK * w / sum(weights)) < 1 + 1e-9 for n, w in zip(counts, weights, strict=True)
    )


@pytest.mark.parametrize("weights", [[1, 0], [1, -1], [1, float("inf")], [1, 1e-6]])
def test_weights_that_choose_nothing_are_refused(weights):
    with pytest.raises(InputError, match=r"DATA\.TRAIN_SOURCES"):
        quotas(weights)


def test_each_stretch_has_its_shares_and_each_source_its_epochs():
    sizes, weights = [7, 250], [3, 1]
    mixture = Mixture(sizes, weights, 4)
    drawn = [next(mixture.candidates(position)) for position in range(2 * BLOCK)]
    for stretch in (drawn[:BLOCK], drawn[BLOCK:]):
        assert sum(image < 7 for image in stretch) == 750
    small = [image for image in drawn if image < 7]
    assert all(sorted(small[i : i + 7]) == list(range(7)) for i in range(0, 1400, 7))
    large = [image for image in drawn if image >= 7]
    assert sorted(large[:250]) == sorted(large[250:]) == list(range(7, 257))
    assert large[:250] != large[250:]
    # no source comes in runs: a hundred positions have about their share
    assert 55 < sum(image < 7 for image in drawn[:100]) < 95


def test_one_source_alone_is_as_without_a_mixture():
    alone, mixed = Epochs(13, 3), Mixture([13], [0.4], 3)
    for position in range(3 * BLOCK):
        assert list(mixed.candidates(position)) == list(alone.candidates(position))


def test_replacements_come_from_the_same_source():
    mixture = Mixture([5, 9], [1, 1], 0)
    for position in range(50):
        first, *others = mixture.candidates(position)
        same = range(5) if first < 5 else range(5, 14)
        assert sorted([first, *others]) == list(same)


# From the config


def config(source, folder):
    cfg = get_pretrain_cfg()
    cfg.OUTPUT_DIR = str(folder / "output")
    cfg.DATA.FORMAT = source.format
    cfg.DATA.TRAIN_CAPTIONS, cfg.DATA.TRAIN_IMAGES = source.captions, source.images
    cfg.DATA.TRAIN_SPLIT = source.split
    return cfg


def entry(weight, source) -> list:
    return [weight, source.format, source.captions, source.images]


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict:
    return write_all(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, sources) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(["one two three four five six seven eight nine ten dogs cats sit"], 40, path)
    return Tokenizer(path)


def batches(records, tokenizer, start: int = 0, workers: int = 0, count: int = 6) -> list[dict]:
    targets = (MaskedWords(tokenizer.vocab_size, 0.3, 0.6, 0.3), ParallelPrediction(0.5))
    dataset = train_set(records, tokenizer, 8, 2, targets)
    loader = build_train_loader(dataset, 8, start, workers)
    return list(itertools.islice(loader, count - start))


def rows(batch: dict) -> list[tuple]:
    """A batch's samples with all that is random in them, in an order of their own."""
    return sorted(
        (
            batch["position"][row].item(),
            batch["image"][row].numpy().tobytes(),
            *(
                tuple(batch[key][row][: batch["caption_lengths"][row]].tolist())
                for key in ("caption_tokens", "masked_tokens", "masked_labels")
            ),
            batch["parallel"][row].item(),
            str(batch["image_id"][row]),
        )
        for row in range(len(batch["position"]))
    )


def test_one_source_in_the_list_gives_what_the_plain_keys_give(sources, tokenizer, tmp_path):
    for name in ("coco", "karpathy", "webdataset"):
        plain = config(sources[name], tmp_path)
        listed = config(sources[name], tmp_path)
        listed.DATA.TRAIN_SOURCES = [entry(3, sources[name])]
        listed.DATA.FORMAT = listed.DATA.TRAIN_CAPTIONS = listed.DATA.TRAIN_IMAGES = "unused"
        one, other = (batches(training_records(cfg), tokenizer) for cfg in (plain, listed))
        assert all(torch.equal(a["image"], b["image"]) for a, b in zip(one, other, strict=True))


def mixed_records(sources, folder):
    cfg = get_pretrain_cfg()
    cfg.OUTPUT_DIR = str(folder / "output")
    cfg.DATA.TRAIN_SOURCES = [
        entry(2, sources["coco"]),
        [*entry(1.5, sources["karpathy"]), "restval"],
        entry(1, sources["webdataset"]),
    ]
    return training_records(cfg)


@pytest.mark.parametrize("kind", ["webdataset", "mixed"])
def test_batches_depend_on_neither_workers_nor_restarts_nor_processes(
    sources, tokenizer, tmp_path, monkeypatch, kind
):
    records = (
        mixed_records(sources, tmp_path)
        if kind == "mixed"
        else training_records(config(sources[kind], tmp_path))
    )
    expected = [rows(batch) for batch in batches(records, tokenizer)]
    for workers in (1, 3):
        assert [rows(b) for b in batches(records, tokenizer, 0, workers)] == expected
    for start in (1, 4):
        assert [rows(b) for b in batches(records, tokenizer, start)] == expected[start:]
    for world_size in (2, 4):
        parts = []
        for rank in range(world_size):
            monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
            monkeypatch.setattr(comm, "get_world_size", lambda world_size=world_size: world_size)
            parts.append([rows(batch) for batch in batches(records, tokenizer)])
        assert [sorted(itertools.chain(*iteration)) for iteration in zip(*parts)] == expected


@pytest.mark.parametrize(
    "wrong", ["coco.json", [1, "coco"], ["1", "coco", "a", "b"], [1, "coco", "a", 5]]
)
def test_a_source_of_another_form_is_refused_by_its_place(wrong):
    cfg = get_pretrain_cfg()
    cfg.DATA.TRAIN_SOURCES = [[1, "coco", "a.json", "a"], wrong]
    with pytest.raises(InputError) as caught:
        training_records(cfg)
    assert "DATA.TRAIN_SOURCES[1]: expected [weight, format, captions, images]" in str(caught.value)
    assert f"found {wrong!r}" in str(caught.value)
