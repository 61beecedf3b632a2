"""Training batches from shards that can only be read forwards (`pipe:` commands).

Position p is the next sample of lane p % L (see `lanes.py`). L does not depend on how many
processes or workers there are, and is a multiple of the number of processes: process r serves the
lanes that are r modulo their number, and gets the positions that are. Within a process each worker
reads some of its lanes and yields their part of each iteration; the parts are put together in the
order of positions. So batches are the same however many read, and cursors of the lanes are all that
is needed to go on.
"""

import hashlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass

import numpy as np
import torch
from detectron2.utils import comm
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pretrain.data.lanes import Cursor, Lane, Plan
from pretrain.data.loader import TrainSet, is_image, loader_options, stack_images
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.workers import batches_of

# What a worker sends of an iteration: positions, samples without their pixels, all pixels by key,
# and cursors of the lanes that gave them.
Part = tuple[list[int], list[dict], dict[str, torch.Tensor], dict[int, Cursor]]


class ImageStream:
    """What is read, and how far training has come in it; `gather` comes before `state_dict`."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.cursors: dict[int, Cursor] = {}
        self._iteration = 0

    def gather(self, iteration: int) -> None:
        """Bring together the cursors of all processes after so many iterations. Collective."""
        for cursors in comm.all_gather(self.cursors):
            self.cursors.update({lane: c for lane, c in cursors.items() if self._is_ahead(lane, c)})
        self._iteration = iteration

    def _is_ahead(self, lane: int, cursor: Cursor) -> bool:
        own = self.cursors.get(lane, Cursor())
        return (cursor.block, cursor.taken) > (own.block, own.taken)

    def state_dict(self) -> dict:
        """As of the last `gather`."""
        return {
            "iteration": self._iteration,
            "reads": self._what_is_read(),
            "cursors": {lane: list(astuple(cursor)) for lane, cursor in self.cursors.items()},
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on where the state was gathered."""
        own = self._what_is_read()
        if differing := [key for key in own if own[key] != state["reads"].get(key)]:
            raise InputError(
                f"The checkpoint has read other pipes, or in another way: {differing[0]} was "
                f"{state['reads'].get(differing[0])}, now it is {own[differing[0]]}. Resume with "
                "what the run began with, or start another."
            )
        self._iteration = state["iteration"]
        self.cursors = {int(lane): Cursor(*cursor) for lane, cursor in state["cursors"].items()}

    def check_iteration(self, iteration: int) -> None:
        """Raise InputError if the cursors are of another iteration."""
        if iteration != self._iteration:
            raise InputError(
                f"The pipes were read for {self._iteration} iterations and the checkpoint is of "
                f"{iteration}: it does not say where to go on. Resume from another checkpoint."
            )

    def _what_is_read(self) -> dict:
        plan = self.plan
        names = "\n".join(plan.shards).encode("utf-8", "surrogateescape")
        return {
            "DATA.TRAIN_CAPTIONS": hashlib.sha256(names).hexdigest()[:12],
            "DATA.STREAM_LANES": plan.lanes,
            "DATA.STREAM_BLOCK": plan.block,
            "DATA.FRACTION": plan.fraction,
            "DATA.SUBSET_SEED": plan.subset_seed,
            "SEED": plan.seed,
        }


class StreamLoader:
    """Endless batches of this process, in the form of `pretrain.data.loader.collate`.

    Handing a batch out moves the stream's cursors behind it: a checkpoint must be written before
    the next is asked for.

    Args:
        train: makes samples; has no records of its own.
        stream: what is read, and from where on.
        others: of `build_train_loader`; no more workers are started than there are lanes.
    """

    def __init__(
        self,
        train: TrainSet,
        stream: ImageStream,
        batch_size_total: int,
        start_iteration: int = 0,
        num_workers: int = 0,
        pin: bool = False,
    ):
        rank, world_size = comm.get_rank(), comm.get_world_size()
        lanes = stream.plan.lanes
        for value, key in (
            (lanes, "DATA.STREAM_LANES"),
            (batch_size_total, "SOLVER.IMS_PER_BATCH"),
        ):
            if value % world_size:
                raise InputError(
                    f"{key}: {value} is not a multiple of the {world_size} processes. (Of "
                    "STREAM_LANES no more count than there are shards.)"
                )
        stream.check_iteration(start_iteration)
        self._train = train
        self._stream = stream
        self._num_parts = max(1, min(num_workers, lanes // world_size))
        self._size = batch_size_total // world_size
        places = range(rank, batch_size_total, world_size)
        parts = _StreamParts(train, stream, start_iteration, batch_size_total, places)
        self._pin = pin
        options = loader_options(self._num_parts if num_workers else 0, pin=False)
        # torch's own collate_fn would make tensors of arrays again
        self._parts = DataLoader(parts, batch_size=None, collate_fn=_unchanged, **options)

    def __iter__(self) -> Iterator[dict]:
        # no variable for the iterator: a traceback that is kept would keep its workers
        for received in zip(*[batches_of(lambda: iter(self._parts))] * self._num_parts):
            samples = {}
            for positions, part, pixels, _ in received:
                samples.update(zip(positions, _with_pixels(part, pixels)))
            in_order = [samples[position] for position in sorted(samples)]
            batch = self._train.samples.collate(in_order, self._pin)
            self._train.check(batch, self._size)
            for *_, cursors in received:
                self._stream.cursors.update(cursors)
            yield batch


def _unchanged(part: Part) -> Part:
    return part


@dataclass(eq=False)
class _StreamParts(IterableDataset):
    """In each worker: the positions of its lanes, an iteration after the other.

    DataLoader takes from its workers in turn, so that as many parts as there are workers are one
    iteration.
    """

    train: TrainSet
    stream: ImageStream
    start_iteration: int
    batch_size_total: int
    places: range  # of this process, within the batch

    def __iter__(self) -> Iterator[Part]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        plan, world_size = self.stream.plan, self.places.step
        lanes: dict[int, Lane] = {}
        for iteration in itertools.count(self.start_iteration):
            first = iteration * self.batch_size_total
            positions, samples = [], []
            for position in (first + place for place in self.places):
                number = position % plan.lanes
                if number // world_size % num_workers != worker:
                    continue
                if number not in lanes:
                    cursor = self.stream.cursors.get(number, Cursor())
                    lanes[number] = Lane(number, plan, cursor)
                failures = []
                records = ((None, record) for record in lanes[number].records(failures))
                positions.append(position)
                samples.append(self.train.first_usable(position, records, failures))
                if "position" not in samples[-1]:  # the batch will be refused: say so at once
                    break
            cursors = {p % plan.lanes: lanes[p % plan.lanes].cursor for p in positions}
            hopeless = bool(samples) and "position" not in samples[-1]
            yield positions, *_without_pixels(samples), cursors
            if hopeless:
                return


def _without_pixels(samples: list[dict]) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Take pixels out as one tensor for each key, and make other tensors arrays: a tensor that goes
    to another process costs a file descriptor, of which there are a thousand."""
    usable = [sample for sample in samples if "position" in sample]
    keys = [key for key, value in usable[0].items() if is_image(value)] if usable else []
    pixels = {key: stack_images([sample.pop(key) for sample in usable]) for key in keys}
    return [
        {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in sample.items()}
        for sample in samples
    ], pixels


def _with_pixels(samples: list[dict], pixels: Mapping[str, torch.Tensor]) -> Iterator[dict]:
    """The samples as they were."""
    images = {key: iter(of_all) for key, of_all in pixels.items()}
    for sample in samples:
        whole = {
            k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in sample.items()
        }
        if "position" in sample:
            whole |= {key: next(of_key) for key, of_key in images.items()}
        yield whole
