"""Samples are functions of (seed, position); batches follow from that, whoever computes them."""

import itertools
import logging
import pickle
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.utils import comm
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pretrain.config import get_pretrain_cfg
from pretrain.data import loader as loader_module
from pretrain.data.formats import Source, load_coco_captions, load_records
from pretrain.data.loader import (
    Samples,
    TrainSet,
    ValSet,
    build_train_loader,
    build_val_loader,
    split_batch,
)
from pretrain.data.records import CaptionRecord, take_fraction
from pretrain.methods.captioning.samples import CaptionSamples, unigram_entropy
from pretrain.methods.captioning.tokenizer import Tokenizer, train_tokenizer
from pretrain.transforms import swap_sides
from tests.pretrain.caption_files import caption_samples, train_set
from virtex_d2.engine.errors import InputError

# more workers than cores are slow, and just what is to be tested
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

NUM_IMAGES = 11
BATCH = 4
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer([" ".join(WORDS), "a red square left right of it"], 60, path)
    return Tokenizer(path)


def write_images(folder: Path) -> list[CaptionRecord]:
    """Images of noise, and between one and five captions each; every caption says whose it is."""
    rng = np.random.default_rng(0)
    records = []
    for i in range(NUM_IMAGES):
        path = folder / f"{i}.jpg"
        Image.fromarray(rng.integers(0, 256, (40, 56, 3), dtype=np.uint8)).save(path)
        captions = tuple(f"{WORDS[i]} left {WORDS[number]}" for number in range(i % 5 + 1))
        records.append(CaptionRecord(1000 + i, str(path), captions))
    return records


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> list[CaptionRecord]:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def damaged_records(tmp_path) -> list[CaptionRecord]:
    """The same, with images 2 and 5 cut short."""
    records = write_images(tmp_path)
    for i in (2, 5):
        whole = Path(records[i].file_name).read_bytes()
        Path(records[i].file_name).write_bytes(whole[: len(whole) // 2])
    return records


def training(records, tokenizer, seed: int = 3) -> TrainSet:
    return train_set(records, tokenizer, 16, seed)


def validation(records, tokenizer) -> ValSet:
    return ValSet(records, caption_samples(tokenizer, 16))


def take(loader, count: int) -> list[dict]:
    return list(itertools.islice(iter(loader), count))


def as_rank(monkeypatch, rank: int, world_size: int) -> None:
    monkeypatch.setattr(comm, "get_rank", lambda: rank)
    monkeypatch.setattr(comm, "get_world_size", lambda: world_size)


def assert_same(one: list[dict], other: list[dict]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other):
        assert a.keys() == b.keys()
        for key in a:
            same = torch.equal(a[key], b[key]) if torch.is_tensor(a[key]) else a[key] == b[key]
            assert same, key


# What a sample depends on


@settings(max_examples=25)
@given(positions=st.lists(st.integers(0, 5 * NUM_IMAGES) | st.integers(0, 2**40), max_size=6))
def test_a_sample_does_not_depend_on_what_was_asked_before(records, tokenizer, positions):
    used = training(records, tokenizer)
    for position in positions:
        assert_same([used[position]], [training(records, tokenizer)[position]])


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_do_not_depend_on_the_number_of_workers(records, tokenizer, workers):
    dataset = training(records, tokenizer)
    alone = take(build_train_loader(dataset, BATCH, num_workers=0), 7)
    shared = take(build_train_loader(dataset, BATCH, num_workers=workers), 7)
    assert_same(alone, shared)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_restart_goes_on_with_the_batch_that_would_have_come(records, tokenizer, workers):
    whole = take(build_train_loader(training(records, tokenizer), BATCH), 9)
    for start in (1, 4, 8):
        rest = build_train_loader(training(records, tokenizer), BATCH, start, workers)
        assert_same(whole[start:], take(rest, 9 - start))


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_see_what_one_would(records, tokenizer, monkeypatch, world_size):
    dataset = training(records, tokenizer)
    whole = take(build_train_loader(dataset, BATCH), 6)
    for rank in range(world_size):
        as_rank(monkeypatch, rank, world_size)
        part = take(build_train_loader(training(records, tokenizer), BATCH), 6)
        for batch, share in zip(whole, part):
            rows = slice(rank, None, world_size)
            longest = share["caption_tokens"].shape[1]
            assert torch.equal(share["image"], batch["image"][rows])
            assert torch.equal(share["position"], batch["position"][rows])
            assert torch.equal(share["caption_tokens"], batch["caption_tokens"][rows, :longest])
            assert share["image_id"] == batch["image_id"][rows]


def test_pixels_and_captions_of_a_position_change_with_the_seed_alone(records, tokenizer):
    one, other = training(records, tokenizer, 3), training(records, tokenizer, 4)
    orders = [[d[p]["image_id"] for p in range(NUM_IMAGES)] for d in (one, other)]
    assert orders[0] != orders[1]
    same_image = train_set(records[:1], tokenizer, 16, 3)
    views = {same_image[position]["image"].numpy().tobytes() for position in range(20)}
    assert len(views) == 20


def test_torch_and_numpy_seeds_change_nothing(records, tokenizer):
    dataset = training(records, tokenizer)
    before = [dataset[position] for position in range(4)]
    torch.manual_seed(99)
    np.random.seed(99)
    assert_same(before, [dataset[position] for position in range(4)])


def test_the_dataset_travels_to_processes_that_are_not_forked(records, tokenizer):
    dataset = training(records, tokenizer)
    before = dataset[17]
    assert_same([before], [pickle.loads(pickle.dumps(dataset))[17]])


# What comes in an epoch


def test_each_epoch_shows_every_image_once_in_its_own_order(records, tokenizer):
    dataset = training(records, tokenizer)
    epochs = [
        [dataset[position]["image_id"] for position in range(start, start + NUM_IMAGES)]
        for start in range(0, 4 * NUM_IMAGES, NUM_IMAGES)
    ]
    everything = [record.image_id for record in records]
    assert all(sorted(epoch) == everything for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_orders_of_epochs_past_do_not_pile_up(records, tokenizer):
    dataset = training(records, tokenizer)
    for epoch in range(6):
        dataset.order.order(epoch)
    assert list(dataset.order._orders) == [4, 5]


def test_a_visit_draws_any_of_the_captions(records, tokenizer):
    dataset = training(records[4:5], tokenizer)  # five captions
    drawn = Counter(
        tokenizer.decode(dataset[position]["caption_tokens"]).replace("right", "left")
        for position in range(200)
    )
    assert set(drawn) == set(records[4].captions)
    assert min(drawn.values()) > 20


# Captions as tokens


@given(
    words=st.lists(st.sampled_from(WORDS + ["zebra", "\u00e9", ""]), max_size=60),
    max_length=st.integers(3, 40),
)
def test_a_caption_of_any_length_begins_with_sos_and_ends_with_eos(tokenizer, words, max_length):
    """Guards against truncation that drops [EOS], and with it the start of a backward caption."""
    samples = caption_samples(tokenizer, 16, max_length=max_length)
    caption = " ".join(words)
    tokens, pieces = samples.encode(caption), tokenizer.encode(caption)
    assert len(tokens) == min(len(pieces) + 2, max_length)
    assert (tokens[0], tokens[-1]) == (1, 2)
    assert tokens[1:-1] == pieces[: max_length - 2]


def test_captions_with_no_room_for_a_piece_are_refused_by_key(tokenizer):
    with pytest.raises(InputError, match=r"MODEL\.TEXTUAL\.MAX_LENGTH 2"):
        caption_samples(tokenizer, 16, max_length=2)


@given(lengths=st.lists(st.integers(2, 30), min_size=1, max_size=8))
def test_a_batch_is_padded_to_its_longest_caption(lengths):
    samples = [
        {
            "image": torch.full((3, 4, 4), i, dtype=torch.uint8),
            "caption_tokens": torch.arange(1, length + 1),
            "caption_lengths": torch.tensor(length),
            "image_id": f"image {i}",
            "position": 10 * i,
            "failures": [],
        }
        for i, length in enumerate(lengths)
    ]
    batch = CaptionSamples.collate(CaptionSamples, samples)
    assert batch["caption_tokens"].shape == (len(lengths), max(lengths))
    assert batch["caption_lengths"].tolist() == lengths
    for row, length in zip(batch["caption_tokens"], lengths):
        assert row.tolist() == [*range(1, length + 1), *[0] * (max(lengths) - length)]
    assert batch["image"].shape == (len(lengths), 3, 4, 4)
    assert batch["image"].dtype == torch.uint8
    assert batch["image"][:, 0, 0, 0].tolist() == list(range(len(lengths)))
    assert batch["image_id"] == [f"image {i}" for i in range(len(lengths))]
    assert batch["position"].tolist() == [10 * i for i in range(len(lengths))]
    assert batch["num_skipped"] == 0
    assert batch["skipped_files"] == []


def test_a_batch_in_passes_is_the_batches_of_as_many_processes():
    rows = {"image": torch.arange(12).view(6, 1, 2), "image_id": list("abcdef")}
    batch = {**rows, "position": torch.arange(6), "skipped_files": ["x.jpg"], "iteration": 4}
    parts = split_batch({**batch, "num_skipped": 1}, 3)
    assert [part["position"].tolist() for part in parts] == [[0, 3], [1, 4], [2, 5]]
    assert parts[1]["image"].tolist() == [[[2, 3]], [[8, 9]]]
    assert parts[2]["image_id"] == ["c", "f"]
    assert all((part["iteration"], part["num_skipped"]) == (4, 1) for part in parts)
    assert all(part["skipped_files"] == ["x.jpg"] for part in parts)
    with pytest.raises(ValueError, match="words of the batch has 5 rows, not 6"):
        split_batch({**batch, "words": torch.zeros(5)}, 2)


# Images that cannot be decoded


@pytest.mark.parametrize("workers", [0, 3])
def test_a_damaged_image_is_replaced_by_the_next_of_its_epoch_and_named_once(
    damaged_records, tokenizer, caplog, workers
):
    damaged = {damaged_records[i].image_id: damaged_records[i].file_name for i in (2, 5)}
    dataset = training(damaged_records, tokenizer)
    with caplog.at_level(logging.WARNING, "pretrain.data.loader"):
        batches = take(build_train_loader(dataset, BATCH, num_workers=workers), 11)

    shown = [image_id for batch in batches for image_id in batch["image_id"]]
    whole = training(damaged_records, tokenizer)
    for position, image_id in enumerate(shown):
        epoch, place = divmod(position, NUM_IMAGES)
        order = [damaged_records[i].image_id for i in whole.order.order(epoch)]
        while order[place % NUM_IMAGES] in damaged:
            place += 1
        assert image_id == order[place % NUM_IMAGES]
    assert all(len(batch["image"]) == BATCH for batch in batches)

    skipped = [name for batch in batches for name in batch["skipped_files"]]
    assert set(skipped) == set(damaged.values())
    assert len(skipped) == sum(batch["num_skipped"] for batch in batches) >= 8  # four epochs
    for name in damaged.values():
        named = [record for record in caplog.records if name in record.getMessage()]
        assert len(named) == 1
        assert "truncated" in named[0].getMessage()


def test_damage_changes_no_other_sample(records, damaged_records, tokenizer):
    whole, damaged = training(records, tokenizer), training(damaged_records, tokenizer)
    for position in range(2 * NUM_IMAGES):
        one, other = whole[position], damaged[position]
        if not other["failures"]:
            assert_same([one], [other])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_folder_of_nothing_but_damaged_images_is_one_clear_error(tmp_path, tokenizer, workers):
    records = write_images(tmp_path)
    for record in records:
        Path(record.file_name).write_bytes(b"no image")
    with pytest.raises(InputError, match=r"\.jpg: neither this image nor those after") as caught:
        take(build_train_loader(training(records, tokenizer), BATCH, num_workers=workers), 1)
    assert "Traceback" not in str(caught.value)
    assert "worker" not in str(caught.value)


def test_the_search_for_a_replacement_has_an_end(damaged_records, tokenizer, monkeypatch):
    monkeypatch.setattr(loader_module, "MAX_REPLACEMENTS", 1)
    with pytest.raises(InputError, match="at most 1 are tried"):
        take(build_train_loader(training(damaged_records, tokenizer), NUM_IMAGES), 1)


# Validation


@pytest.mark.parametrize(
    ("world_size", "workers"), [(1, 0), (2, 0), (3, 0), (64, 0), (1, 2), (2, 2)]
)
def test_validation_sees_every_caption_once_in_order(
    records, tokenizer, monkeypatch, world_size, workers
):
    seen = []
    for rank in range(world_size):
        as_rank(monkeypatch, rank, world_size)
        for batch in build_val_loader(validation(records, tokenizer), 3, workers):
            assert len(batch["image"]) <= 3
            texts = [tokenizer.decode(row) for row in batch["caption_tokens"]]
            seen += zip(batch["position"].tolist(), batch["image_id"], texts)
    expected = [(record.image_id, caption) for record in records for caption in record.captions]
    assert seen == [(position, *pair) for position, pair in enumerate(expected)]


def test_validation_pixels_are_those_of_the_image_and_decoded_once(records, tokenizer, monkeypatch):
    reads = Counter()
    read = loader_module.read_image
    monkeypatch.setattr(
        loader_module, "read_image", lambda path, side: reads.update([path]) or read(path, side)
    )
    dataset = validation(records, tokenizer)
    by_id = {record.image_id: record for record in records}
    for batch in build_val_loader(dataset, 4):
        for pixels, image_id in zip(batch["image"], batch["image_id"]):
            image = read(by_id[image_id].file_name, 16)
            assert torch.equal(pixels, dataset.samples.val_view(image, "")[0])
    assert reads == Counter({record.file_name: 1 for record in records})


@pytest.mark.parametrize("world_size", [1, 3])
def test_validation_leaves_damaged_images_out_and_counts_each_once(
    damaged_records, tokenizer, monkeypatch, caplog, world_size
):
    skipped, seen = [], Counter()
    for rank in range(world_size):
        as_rank(monkeypatch, rank, world_size)
        for batch in build_val_loader(validation(damaged_records, tokenizer), 2):
            skipped += batch["skipped_files"]
            seen.update(batch["image_id"])
    damaged = [damaged_records[i] for i in (2, 5)]
    assert skipped == [record.file_name for record in damaged]
    assert seen == Counter(
        {r.image_id: len(r.captions) for r in damaged_records if r not in damaged}
    )
    assert damaged[0].file_name in caplog.text


def test_a_validation_batch_of_damaged_images_alone_is_empty(tmp_path, tokenizer):
    records = write_images(tmp_path)[2:3]
    Path(records[0].file_name).write_bytes(b"")
    (batch,) = build_val_loader(validation(records, tokenizer), 8)
    assert len(batch["position"]) == 0
    assert batch["num_skipped"] == 1
    assert batch["skipped_files"] == [records[0].file_name]


# The scale of a loss


def test_unigram_entropy_counts_every_token_that_is_predicted():
    """[SOS] is given, and unknown pieces (0) are padding, which the loss leaves out."""
    pieces = {"a": [4], "b": [5, 4], "unknown a": [0, 4]}
    words = SimpleNamespace(pad_id=0, sos_id=1, eos_id=2, vocab_size=6, encode=pieces.__getitem__)
    records = [CaptionRecord(0, "", ("a", "b")), CaptionRecord(1, "", ("unknown a",))]
    share = np.array([3, 1, 3]) / 7  # of 4, of 5 and of [EOS]
    expected = -(share * np.log(share)).sum()
    assert unigram_entropy(validation(records, words)) == pytest.approx(expected)


# Images of which nothing is said


def test_images_alone_are_read_in_fractions_and_one_view_is_a_sample(tmp_path):
    write_images(tmp_path)
    records = load_records(Source("images", "", str(tmp_path)))
    assert [record.captions for record in records] == [()] * NUM_IMAGES
    half = take_fraction(records, 0.5, captions_per_image=1)
    assert {record.file_name for record in half} < {record.file_name for record in records}
    cfg = get_pretrain_cfg()
    cfg.DATA.IMAGE_SIZE = 16
    samples = Samples(cfg)
    batch = take(build_train_loader(TrainSet(half, samples, 1), BATCH), 1)[0]
    assert batch["image"].shape == (BATCH, 3, 16, 16)
    assert batch["jitter"].shape == (BATCH, 4, 2)
    assert sum(len(b["image"]) for b in build_val_loader(ValSet(records, samples), 3)) == NUM_IMAGES


# Real photographs


def test_real_photographs_and_captions_make_whole_batches(real_data, tmp_path):
    coco = real_data / "coco"
    records = load_coco_captions(coco / "annotations" / "captions_pretrain.json", coco / "val2017")
    train_tokenizer((text for r in records for text in r.captions), 4000, tmp_path / "t.model")
    dataset = train_set(records, Tokenizer(tmp_path / "t.model"), 112, 1)
    by_id = {record.image_id: record for record in records}
    for batch in take(build_train_loader(dataset, 32), 3):
        assert batch["image"].shape == (32, 3, 112, 112)
        assert batch["num_skipped"] == 0
        assert batch["caption_lengths"].max() <= 30
        for row, length, image_id in zip(
            batch["caption_tokens"], batch["caption_lengths"], batch["image_id"]
        ):
            assert row[length - 1] == 2
            written = by_id[image_id].captions
            possible = [
                dataset.samples.encode(text) for text in written + tuple(map(swap_sides, written))
            ]
            assert row[:length].tolist() in possible
    assert 5.1 < unigram_entropy(dataset) < 5.4
