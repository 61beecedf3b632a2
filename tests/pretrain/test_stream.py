"""Shards from pipes: batches are the same however many read them, and wherever they go on."""

import contextlib
import gc
import itertools
import os
from collections import Counter
from dataclasses import astuple, replace
from pathlib import Path

import pytest
import torch
from detectron2.utils import comm
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config import get_pretrain_cfg
from pretrain.data import lanes as lanes_module
from pretrain.data.lanes import Cursor, Lane, Plan
from pretrain.data.shards import stream_members
from pretrain.data.sources import stream_plan
from pretrain.data.stream import ImageStream, StreamLoader
from pretrain.methods.captioning.samples import load_or_train_tokenizer
from pretrain.methods.captioning.tokenizer import Tokenizer, train_tokenizer
from pretrain.trainer import PretrainTrainer
from tests.pretrain.caption_files import train_set, write_images, write_shards, write_tar
from virtex_d2.engine.errors import InputError

# more workers than cores are slow, and just what is to be tested
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

NUM_IMAGES, NUM_SHARDS, BATCH = 26, 9, 8


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> list[Path]:
    """Nine shards of two or three samples; captions say whose they are."""
    folder = tmp_path_factory.mktemp("stream")
    captions = {
        f"{i:02}.jpg": [f"image {i} caption {j}" for j in range(i % 3 + 1)]
        for i in range(NUM_IMAGES)
    }
    images = write_images(folder / "images", captions)
    return write_shards(folder / "shards", images, captions, NUM_SHARDS)


@pytest.fixture(scope="module")
def damaged(shards, tmp_path_factory) -> list[Path]:
    """The same; one is cut short, one is gone, others have samples of no use."""
    folder = tmp_path_factory.mktemp("damaged")
    paths = [folder / path.name for path in shards]
    for path, whole in zip(paths, shards):
        path.write_bytes(whole.read_bytes())
    paths[1].write_bytes(shards[1].read_bytes()[:5000])
    paths[4].unlink()
    write_tar(
        paths[6], [("x.jpg", b"no image"), ("x.txt", b"text"), ("y.jpg", b""), ("z.txt", b"")]
    )
    return paths


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(["image caption 0 1 2 3 4 5 6 7 8 9"], 30, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(tokenizer_file) -> Tokenizer:
    return Tokenizer(tokenizer_file)


def plan_of(paths: list[Path], lanes: int = 4, block: int = 3, **options) -> Plan:
    return Plan(tuple(f"pipe:cat {path} 2> /dev/null" for path in paths), lanes, block, **options)


def batches(
    plan: Plan, tokenizer: Tokenizer, count: int = 8, workers: int = 0, state: dict | None = None
) -> tuple[list[dict], dict]:
    """Batches up to iteration `count`, and the state after the last."""
    stream, start = ImageStream(plan), 0
    if state:
        stream.load_state_dict(state)
        start = state["iteration"]
    dataset = train_set([], tokenizer, 8, plan.seed)
    loader = iter(StreamLoader(dataset, stream, BATCH, start, workers))
    found = list(itertools.islice(loader, count - start))
    stream.gather(count)
    return found, stream.state_dict()


def rows(batch: dict) -> tuple:
    """A batch's samples by position, and what it reports."""
    samples = zip(
        batch["position"].tolist(), batch["image"], batch["caption_tokens"], batch["image_id"]
    )
    return (
        sorted(
            (position, pixels.numpy().tobytes(), tuple(t for t in tokens.tolist() if t), image_id)
            for position, pixels, tokens, image_id in samples
        ),
        sorted(zip(batch["skipped_files"], batch["skipped_reasons"])),
    )


# What a lane gives


def keys(lane: Lane, count: int) -> list[str]:
    records = lane.records([])
    return [next(records).image_id for _ in range(count)]


def test_a_pass_over_the_shards_gives_each_sample_once_and_the_next_another_order(shards):
    plan = plan_of(shards, lanes=1)
    found = keys(Lane(0, plan, Cursor()), 2 * NUM_IMAGES)
    passes = found[:24], found[27:51]  # a block of three may span both
    assert all(max(Counter(each).values()) == 1 for each in passes)
    assert passes[0] != passes[1]
    assert max(Counter(found).values()) <= 3
    assert len(set(found)) == NUM_IMAGES


def test_lanes_share_each_pass(shards):
    plan = plan_of(shards, lanes=3, block=1)
    found = [shard for lane in range(3) for shard in (lane, lane + 3, lane + 6)]
    assert sorted(plan.shard(ordinal) for ordinal in found) == sorted(plan.shards)


def test_blocks_are_shuffled_by_lane_and_number():
    plan = plan_of([], lanes=2, block=50)
    orders = [tuple(plan.shuffled(list(range(50)), *at)) for at in ((0, 0), (0, 1), (1, 0))]
    assert len(set(orders)) == 3
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_a_pipes_samples_that_cannot_be_told_apart_are_passed_over_by_name(tmp_path):
    good = [("4.jpg", b"x"), ("4.json", b'{"text": "A"}')]
    twice = [("1.jpg", b"x"), ("1.txt", b"A"), ("1.jpg", b"y")]
    stray = [("2.jpg", b"x"), ("2.txt", b"B"), ("2.b.jpg", b"y")]
    path = write_tar(tmp_path / "a.tar", twice + stray + [("3.jpg", b"x"), *good, ("3.txt", b"C")])
    failures = []
    lane = Lane(0, plan_of([path], lanes=1, block=2, caption_key="text"), Cursor())
    records = lane.records(failures)
    found = {record.image_id: record.captions for record in itertools.islice(records, 2)}
    assert found == {"2": ("B",), "4": ("A",)}
    reasons = [(name.rpartition("/")[2], reason) for name, reason in failures]
    assert [name for name, _ in reasons] == ["1", "2.b", "3"]
    assert "two members 1.jpg" in reasons[0][1]
    assert "first dot of 2.b.jpg" in reasons[1][1]


@settings(max_examples=25)
@given(lane=st.integers(0, 2), count=st.integers(1, 30), block=st.integers(1, 8), cut=st.booleans())
def test_a_lane_goes_on_at_any_cursor(shards, damaged, lane, count, block, cut):
    plan = plan_of(damaged if cut else shards, lanes=3, block=block)
    one, failures = Lane(lane, plan, Cursor()), []
    records = one.records(failures)
    for _ in range(count):
        next(records)
    cursor, before = one.cursor, len(failures)
    again, later = Lane(lane, plan, cursor), []
    resumed = again.records(later)
    for _ in range(12):
        assert next(resumed) == next(records)
        assert again.cursor == one.cursor
    assert later == failures[before:]


# Invariance


@pytest.mark.parametrize("kind", ["whole", "damaged"])
def test_batches_depend_on_neither_workers_nor_restarts_nor_processes(
    shards, damaged, tokenizer, monkeypatch, kind
):
    plan = plan_of(shards if kind == "whole" else damaged)
    found, last = batches(plan, tokenizer)
    expected = [rows(batch) for batch in found]
    assert all(len(samples) == BATCH for samples, _ in expected)
    assert any(failures for _, failures in expected) == (kind == "damaged")

    for workers in (1, 3):
        found, state = batches(plan, tokenizer, workers=workers)
        assert [rows(batch) for batch in found] == expected
        assert state == last
    for start in (1, 2, 5):
        _, state = batches(plan, tokenizer, start)
        found, state = batches(plan, tokenizer, 8, start % 3, state)
        assert [rows(batch) for batch in found] == expected[start:]
        assert state == last

    for world_size in (2, 4):
        as_rank(monkeypatch, 0, world_size)
        parts = []
        for rank in range(world_size):
            as_rank(monkeypatch, rank, world_size)
            parts.append(batches(plan, tokenizer, workers=rank % 2))
        for iteration, together in enumerate(zip(*(found for found, _ in parts))):
            samples, failures = zip(*map(rows, together))
            assert sorted(itertools.chain(*samples)) == expected[iteration][0]
            assert sorted(itertools.chain(*failures)) == expected[iteration][1]
        cursors = {}
        for _, state in parts:
            cursors.update(state["cursors"])
        assert cursors == last["cursors"]


def as_rank(monkeypatch, rank: int, world_size: int) -> None:
    monkeypatch.setattr(comm, "get_rank", lambda: rank)
    monkeypatch.setattr(comm, "get_world_size", lambda: world_size)
    monkeypatch.setattr(comm, "all_gather", lambda own: [own])


def test_a_run_of_two_goes_on_as_one(shards, tokenizer, monkeypatch):
    plan = plan_of(shards)
    expected, _ = batches(plan, tokenizer)
    streams = [ImageStream(plan) for _ in range(2)]
    for rank, stream in enumerate(streams):
        as_rank(monkeypatch, rank, 2)
        dataset = train_set([], tokenizer, 8, plan.seed)
        list(itertools.islice(StreamLoader(dataset, stream, BATCH), 3))
    monkeypatch.setattr(comm, "all_gather", lambda own: [stream.cursors for stream in streams])
    streams[0].gather(3)
    as_rank(monkeypatch, 0, 1)
    found, _ = batches(plan, tokenizer, state=streams[0].state_dict())
    assert list(map(rows, found)) == list(map(rows, expected[3:]))


def test_the_state_survives_a_checkpoint(shards, tokenizer, tmp_path):
    _, state = batches(plan_of(shards), tokenizer, 2)
    torch.save(state, tmp_path / "state.pth")
    assert torch.load(tmp_path / "state.pth", weights_only=True) == state


# Restrictions


def test_a_state_of_another_stream_or_iteration_is_refused(shards, tokenizer):
    plan = plan_of(shards)
    _, state = batches(plan, tokenizer, 2)
    others = [
        (plan_of(shards[1:]), "DATA.TRAIN_CAPTIONS"),
        (plan_of(shards, lanes=2), "DATA.STREAM_LANES"),
        (plan_of(shards, block=4), "DATA.STREAM_BLOCK"),
        (plan_of(shards, seed=1), "SEED"),
    ]
    for other, key in others:
        with pytest.raises(InputError, match=key):
            ImageStream(other).load_state_dict(state)
    stream = ImageStream(plan)
    stream.load_state_dict(state)
    with pytest.raises(InputError, match=r"for 2 iterations.*of 3"):
        StreamLoader(train_set([], tokenizer), stream, BATCH, 3)


def test_lanes_that_do_not_go_into_the_processes_are_refused(shards, tokenizer, monkeypatch):
    as_rank(monkeypatch, 0, 4)
    with pytest.raises(InputError, match=r"DATA\.STREAM_LANES: 6 is not a multiple of the 4"):
        batches(plan_of(shards, lanes=6), tokenizer)


def test_workers_beyond_the_lanes_are_not_started(shards, tokenizer):
    one, _ = batches(plan_of(shards, lanes=2), tokenizer, 2, workers=5)
    other, _ = batches(plan_of(shards, lanes=2), tokenizer, 2)
    assert list(map(rows, one)) == list(map(rows, other))


# Shards of no use


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("false", "failed with exit code 1"),
        ("true", "cut short or not a plain tar"),
        ("echo no tar at all; exit 7", "failed with exit code 7"),
        ("head -c 10240 /dev/zero", "it holds no samples"),
        ("no-such-command-at-all 2> /dev/null", "failed with exit code 127"),
    ],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_pipes_that_give_nothing_are_one_clear_error(tokenizer, command, reason, workers):
    plan = Plan((f"pipe:{command}", f"pipe:{command} "), 2)
    with pytest.raises(InputError, match=reason) as caught:
        batches(plan, tokenizer, 1, workers)
    assert f"pipe:{command}" in str(caught.value)


def test_a_command_that_fails_at_its_end_is_reported_and_costs_one_sample(shards):
    """When it fails must not decide how much is read of what it wrote before."""
    plan = Plan((f"pipe:cat {shards[0]} {shards[0]}.none 2> /dev/null",), 1, 1)
    failures = []
    records = Lane(0, plan, Cursor()).records(failures)
    assert [next(records).image_id for _ in range(2)] == ["00", "00"]
    assert failures == [(plan.shards[0], "its command failed with exit code 1, in or after 01")]


def test_a_lane_without_a_usable_sample_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(lanes_module, "MAX_FAILURES", 5)
    path = write_tar(tmp_path / "a.tar", [(f"{i}.jpg", b"x") for i in range(3)])
    failures = []
    assert list(Lane(0, plan_of([path], lanes=1), Cursor()).records(failures)) == []
    assert len(failures) == 5
    assert failures[3][0].endswith("a.tar 2> /dev/null/0")


def test_no_process_is_left_behind(shards, tokenizer):
    gc.collect()
    before = children()
    batches(plan_of(shards), tokenizer, 3)
    gc.collect()
    assert children() <= before


def children() -> set[str]:
    return set(Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split())


# Fractions


def test_fractions_of_a_stream_are_nested_and_about_their_size():
    plans = [plan_of([], fraction=fraction, subset_seed=3) for fraction in (0.1, 0.3, 1.0)]
    chosen = [{i for i in range(5000) if plan.chosen(f"{i:09}", ["a"])} for plan in plans]
    assert chosen[0] < chosen[1] < chosen[2]
    assert 400 < len(chosen[0]) < 600
    assert len(chosen[2]) == 5000
    few = [replace(plans[2], captions_per_image=n).chosen("k", list("abcde")) for n in (1, 2, 9)]
    assert set(few[0]) < set(few[1]) < set(few[2])
    assert few[2] == tuple("abcde")


def test_a_fraction_of_nothing_is_one_clear_error(shards, tokenizer):
    with pytest.raises(InputError, match=r"DATA\.FRACTION leaves no sample"):
        batches(plan_of(shards, fraction=1e-9), tokenizer, 1)


# From the config


def config(captions: str, **data):
    cfg = get_pretrain_cfg()
    cfg.DATA.FORMAT, cfg.DATA.TRAIN_CAPTIONS, cfg.DATA.TOKENIZER = "webdataset", captions, "t.model"
    for key, value in data.items():
        cfg.DATA[key] = value
    return cfg


def test_the_config_gives_the_plan():
    plan = stream_plan(config("pipe:curl -s host/{00..11}.tar", STREAM_LANES=8, FRACTION=0.5))
    assert plan.shards == tuple(f"pipe:curl -s host/{i:02}.tar" for i in range(12))
    assert (plan.lanes, plan.block, plan.fraction) == (8, 100, 0.5)
    assert stream_plan(config("pipe:cat {0..2}.tar")).lanes == 3
    assert stream_plan(config("shards/{0..2}.tar")) is None
    assert astuple(Cursor()) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"STREAM_LANES": 0}, "DATA.STREAM_LANES 0"),
        ({"STREAM_BLOCK": 0}, "DATA.STREAM_BLOCK 0"),
        ({"FRACTION": 0.0}, "DATA.FRACTION 0"),
        (
            {"TRAIN_SOURCES": [[1, "coco", "a", "b"], [1, "webdataset", "pipe:cat a.tar", ""]]},
            "cannot be mixed",
        ),
    ],
)
def test_what_a_stream_cannot_do_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        stream_plan(config("pipe:cat a.tar", **changes))


def test_a_stream_has_no_end_to_train_a_tokenizer_on():
    cfg = config("pipe:cat a.tar", TOKENIZER="")
    with pytest.raises(InputError, match="DATA.TOKENIZER is empty: pipe:cat a.tar"):
        load_or_train_tokenizer(cfg, None)


# A whole run


class StopError(Exception):
    """Ends a run in the midst of it."""


def run_of(
    folder: Path, shards: list[Path], model: Path, stop_after: int = 6, **data
) -> dict[int, tuple]:
    """Train for at most six iterations; the batch of each."""
    cfg = config(f"pipe:cat {shards[0].parent}/{{00000..00008}}.tar", TOKENIZER=str(model), **data)
    folder.mkdir(exist_ok=True)
    cfg.OUTPUT_DIR, cfg.MODEL.DEVICE, cfg.MODEL.VISUAL.NAME = str(folder), "cpu", "resnet18"
    cfg.MODEL.TEXTUAL.HIDDEN_SIZE, cfg.DATA.IMAGE_SIZE, cfg.DATA.NUM_WORKERS = 64, 32, 0
    cfg.SOLVER.CNN_LR = 0.001  # the paper's rate makes batches of four diverge
    cfg.DATA.STREAM_LANES, cfg.DATA.STREAM_BLOCK, cfg.LOG_PERIOD = 4, 3, 1
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.WARMUP_ITERS = 4, 6, 1
    cfg.SOLVER.CHECKPOINT_PERIOD = 2
    trainer = PretrainTrainer(cfg)
    trainer.resume_or_load(resume=True)
    losses, seen = trainer.loop.losses, {}

    def watched(batch: dict) -> dict:
        if trainer.iter == stop_after:
            raise StopError
        seen[trainer.iter] = rows(batch)
        return losses(batch)

    trainer.loop.losses = watched
    with contextlib.suppress(StopError):
        trainer.train()
    return seen


@pytest.mark.usefixtures("thin_resnets")
def test_a_stopped_run_goes_on_with_the_batches_that_would_have_come(
    shards, tokenizer_file, tmp_path
):
    whole = run_of(tmp_path / "whole", shards, tokenizer_file)
    run_of(tmp_path / "stopped", shards, tokenizer_file, 5)  # a checkpoint after four
    resumed = run_of(tmp_path / "stopped", shards, tokenizer_file)
    assert list(whole) == list(range(6))
    assert resumed == {iteration: whole[iteration] for iteration in (4, 5)}


@pytest.mark.usefixtures("thin_resnets")
def test_a_run_whose_stream_is_mostly_of_no_use_ends_with_the_names(
    damaged, tokenizer_file, tmp_path
):
    with pytest.raises(InputError, match=r"images are unusable.*DATA.MAX_SKIPPED_SHARE"):
        run_of(tmp_path / "run", damaged, tokenizer_file, MAX_SKIPPED_SHARE=0.001)


def test_a_command_that_is_read_from_survives_what_stops_the_run(tmp_path):
    """Schedulers send USR1 and TERM to all processes of a job; half a shard would be skipped."""
    shard = write_tar(tmp_path / "a.tar", [("a.txt", b"one")])
    signals = "kill -USR1 $$; kill -TERM $$; kill -INT $$"
    assert list(stream_members(f"pipe:{signals}; cat {shard}")) == [("a.txt", b"one")]
