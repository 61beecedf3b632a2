"""The order of a detector's images: a function of seed and iteration, whoever asks and when."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from virtex_d2.detection.loader import (
    SAMPLERS,
    TrainingOrder,
    TrainLoader,
    build_sampler,
    build_train_loader,
    read_training_set,
    repeat_factors,
)
from virtex_d2.engine.errors import InputError


@pytest.fixture
def cfg(detection_cfg):
    return detection_cfg


def order(size=23, batch_size=8, rank=0, processes=1, seed=5, upright=None, first=0):
    from virtex_d2.detection.config import get_virtex_cfg

    sampler = build_sampler(get_virtex_cfg(), size, None, seed)
    made = TrainingOrder(sampler, upright, batch_size, rank, processes)
    made.first = first
    return made


def take(batches, number):
    return list(itertools.islice(batches, number))


@given(st.integers(1, 40), st.integers(0, 2**31 - 1), st.integers(0, 60), st.booleans())
def test_a_later_start_goes_on_with_the_same_batches(size, seed, first, grouped):
    upright = np.arange(size) % 3 == 0 if grouped else None
    whole = take(order(size, 4, seed=seed, upright=upright), first + 3)
    assert take(order(size, 4, seed=seed, upright=upright, first=first), 3) == whole[first:]


@given(st.sampled_from([2, 4, 8]), st.booleans())
def test_processes_see_together_what_one_would(processes, grouped):
    upright = np.arange(23) % 2 == 0 if grouped else None
    alone = take(order(upright=upright), 20)
    shares = [
        take(order(upright=upright, rank=rank, processes=processes), 20)
        for rank in range(processes)
    ]
    assert [list(itertools.chain(*parts)) for parts in zip(*shares)] == alone


def test_every_image_is_drawn_once_an_epoch_and_positions_never_repeat():
    draws = list(itertools.chain(*take(order(size=24), 9)))  # three epochs
    assert Counter(draw.index for draw in draws) == dict.fromkeys(range(24), 3)
    assert len({draw.position for draw in draws}) == 72


def test_a_batch_has_images_of_one_orientation():
    upright = np.arange(23) % 4 == 0
    batches = take(order(upright=upright), 30)
    kinds = [{bool(upright[draw.index]) for draw in batch} for batch in batches]
    assert all(len(kind) == 1 for kind in kinds)
    assert {True, False} == set.union(*kinds)


def test_other_seeds_give_other_orders():
    assert take(order(seed=1), 2) != take(order(seed=2), 2)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_goes_on_where_it_was(cfg, sampler):
    cfg.DATALOADER.SAMPLER_TRAIN = sampler
    cfg.DATALOADER.REPEAT_THRESHOLD, cfg.DATALOADER.RANDOM_SUBSET_RATIO = 0.9, 0.7
    training_set = read_training_set(cfg)
    assert (training_set.factors is not None) == (sampler == "RepeatFactorTrainingSampler")

    def files(first):
        loader = TrainLoader(cfg, training_set, seed=3)
        loader.start_at(first)
        return [[sample["file_name"] for sample in batch] for batch in take(loader, 6 - first)]

    assert files(4) == files(0)[4:]


def test_an_unknown_sampler_is_refused(cfg):
    cfg.DATALOADER.SAMPLER_TRAIN = "RepeatFactorSampler"
    with pytest.raises(InputError, match="Did you mean 'RepeatFactorTrainingSampler'"):
        repeat_factors(cfg, [])


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_pixels_do_not_depend_on_workers_nor_on_the_start(cfg, workers):
    cfg.INPUT.MIN_SIZE_TRAIN = (48, 64, 80)  # drawn for each image, as is the flip
    cfg.DATALOADER.NUM_WORKERS = 0
    expected = take(build_train_loader(cfg, seed=3), 8)
    cfg.DATALOADER.NUM_WORKERS = workers
    loader = build_train_loader(cfg, seed=3)
    loader.start_at(5)
    found = take(loader, 3)
    shapes = {sample["image"].shape for batch in expected for sample in batch}
    assert len(shapes) > 1
    for one, other in zip(expected[5:], found):
        for a, b in zip(one, other):
            assert torch.equal(a["image"], b["image"])
            assert torch.equal(a["instances"].gt_boxes.tensor, b["instances"].gt_boxes.tensor)


def test_an_image_is_augmented_anew_each_time(cfg):
    cfg.INPUT.MIN_SIZE_TRAIN = tuple(range(40, 80))
    sizes: dict[str, set] = {}
    for batch in take(build_train_loader(cfg, seed=3), 12):
        for sample in batch:
            sizes.setdefault(sample["file_name"], set()).add(tuple(sample["image"].shape))
    assert all(len(found) > 1 for found in sizes.values())


def test_loading_leaves_the_generators_as_they_are(cfg):
    torch.manual_seed(1)
    np.random.seed(1)
    expected = float(torch.rand(1)), float(np.random.rand())
    torch.manual_seed(1)
    np.random.seed(1)
    take(build_train_loader(cfg, seed=3), 2)
    assert (float(torch.rand(1)), float(np.random.rand())) == expected
