"""Restore a folder of images, and say how far the results are from clean ones."""

import json
import math
import os
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from tabulate import tabulate
from tqdm import tqdm

from pretrain.methods.ipt.degrade import degrade, resize
from pretrain.methods.ipt.files import Restorer
from pretrain.methods.ipt.photo import Photo, made_of, read_photo, write_photo
from pretrain.methods.ipt.pictures import compare
from pretrain.methods.ipt.scores import Scores, psnr_y, score, smallest_side
from pretrain.methods.ipt.sets import CLEAN, DEGRADED, list_images, pair_up
from pretrain.methods.ipt.tasks import Task, parse_task
from pretrain.methods.ipt.tiles import count_tiles, restore_tiled, self_ensemble
from virtex_d2.engine.device import resolve_device
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import atomic_path, sha256

SCORES = "scores.json"


@dataclass(frozen=True)
class Plan:
    """What is to be done.

    Attributes:
        task: what the images are restored from.
        number: of the task, in the network.
        images: a file, or a folder.
        output: the folder of the results.
        reference: a folder of clean images, or None.
        degraded: `images` are clean ones that are degraded first: as for the task of this name, or
            where it is empty for `task`. None: they are not.
        pictures: the folder of comparisons, or None.
        stride, batch_size: as in `tiles.restore_tiled`.
        ensemble: whether each image is restored eight times, see `tiles.self_ensemble`.
        keep, overwrite: what happens to existing files; neither: they are refused.
    """

    task: Task
    number: int
    images: str
    output: str
    reference: str | None = None
    degraded: str | None = None
    pictures: str | None = None
    stride: int = 12
    ensemble: bool = False
    keep: bool = False
    overwrite: bool = False
    batch_size: int = 16


class _Job(NamedTuple):
    name: str
    image: str  # path
    clean: str | None
    result: str
    picture: str | None
    size: tuple[int, int]  # height and width of what is restored
    made: dict[str, object]  # how the result is made, as is written into it
    done: bool  # by an earlier run


class _Pair(NamedTuple):
    degraded: Photo
    clean: Photo | None


def restore(restorer: Restorer, plan: Plan, device: str = "auto") -> str:
    """Restore all images of a plan, after a look at each of them; results appear whole.

    Returns:
        a table of scores, as is in OUT/scores.json too; "" where nothing is clean.
    """
    device = resolve_device(device, name="--device")
    forward = _forward(restorer, plan, device)
    jobs = _jobs(restorer, plan)
    patch, passes = restorer.network.sizes.patch, 8 if plan.ensemble else 1
    left = [job for job in jobs if not job.done]
    tiles = sum(count_tiles(*job.size, patch, plan.stride) for job in left) * passes
    print(
        f"{plan.task.name}: {len(left)} to restore, {len(jobs) - len(left)} kept; {tiles} "
        f"tiles of {patch} pixels on {device}",
        file=sys.stderr,
    )
    scored, every = [], 0.5 if sys.stderr.isatty() else 10  # seconds
    with tqdm(total=tiles, unit="tile", mininterval=every, disable=not tiles) as bar:
        for job in jobs:
            bar.set_description(job.name, refresh=False)
            scores = _restore_one(job, plan, lambda image: forward(image, bar.update))
            if scores is not None:
                scored.append({"image": job.name, **scores})
    return _report(scored, restorer, plan) if scored else ""


def _forward(
    restorer: Restorer, plan: Plan, device: str
) -> Callable[[torch.Tensor, Callable[[int], object]], torch.Tensor]:
    """An image (3, H, W) -> (3, kH, kW), by tiles."""
    network = restorer.network.to(device)
    count_tiles(1, 1, network.sizes.patch, plan.stride)  # refuses patches that do not suit

    @torch.inference_mode()
    def forward(image: torch.Tensor, progress: Callable[[int], object]) -> torch.Tensor:
        def once(image: torch.Tensor) -> torch.Tensor:
            return restore_tiled(
                lambda tiles: network(tiles.to(device), plan.number),
                image,
                network.sizes.patch,
                plan.task.scale,
                plan.stride,
                plan.batch_size,
                progress,
            )

        return self_ensemble(once, image) if plan.ensemble else once(image)

    return forward


# --- what there is to do


def _jobs(restorer: Restorer, plan: Plan) -> list[_Job]:
    """All images, each read once, so that what is wrong is said before hours of work."""
    _check_folders(plan)
    found = list_images(plan.images, DEGRADED if plan.degraded is None else CLEAN, plan.task)
    clean: list[str | None] = [None] * len(found)
    if plan.degraded is not None:
        clean = [image.path for image in found]
    elif plan.reference:
        clean = list(pair_up(found, plan.reference, plan.task, os.path.isdir(plan.images)))
    if any(clean):
        _refuse_existing(os.path.join(plan.output, SCORES), plan)
    jobs = []
    for image, truth in zip(found, clean):
        result = os.path.join(plan.output, f"{image.name}.png")
        picture = plan.pictures and os.path.join(plan.pictures, f"{image.name}.png")
        made = _made(image.path, image.key, restorer, plan)
        job = _Job(image.name, image.path, truth, result, picture, (0, 0), made, False)
        size = _open(job, plan).degraded.size
        jobs.append(job._replace(size=size, done=_is_done(result, made, plan)))
        if picture:
            _is_done(picture, made, plan)
    return jobs


def _check_folders(plan: Plan) -> None:
    """Refuse to write among what is read: the next run would take results for images."""
    outputs = {"OUT": plan.output, "--pictures": plan.pictures}
    inputs = {"IN": plan.images, "--reference": plan.reference}
    for name, folder in outputs.items():
        if folder and os.path.exists(folder) and not os.path.isdir(folder):
            raise InputError(f"{name} {folder}: expected a folder or nothing there, found a file.")
        for read, place in inputs.items():
            if not folder or not place:
                continue
            inner, outer = os.path.realpath(folder), os.path.realpath(place)
            outer = outer if os.path.isdir(outer) else os.path.dirname(outer)
            if inner == outer or (os.path.isdir(place) and inner.startswith(outer + os.sep)):
                raise InputError(
                    f"{name} {folder}: lies in the folder of {read}, {place}: results would be "
                    "taken for images. Choose another folder."
                )
    if plan.pictures and os.path.realpath(plan.pictures) == os.path.realpath(plan.output):
        raise InputError(
            f"--pictures {plan.pictures}: is OUT itself, where the results get the same names. "
            "Choose another folder."
        )


def _made(path: str, key: str, restorer: Restorer, plan: Plan) -> dict[str, object]:
    """How the result of an image is made: what must be equal for it to be kept."""
    made = {
        "image_sha256": sha256(path),
        "checkpoint_sha256": restorer.sha256,
        "task": plan.task.name,
        "number": plan.number,
        "stride": plan.stride,
        "ensemble": plan.ensemble,
    }
    if plan.degraded is not None:
        # of the name alone: in which order, and beside which others, must not matter
        made |= {"degraded": _degradation(plan).name, "seed": zlib.crc32(os.fsencode(key))}
    return made


def _degradation(plan: Plan) -> Task:
    task = parse_task(plan.degraded) if plan.degraded else plan.task
    if task.scale != plan.task.scale:
        raise InputError(
            f"--degrade {task.name}: makes images {task.scale} times smaller, --task "
            f"{plan.task.name} enlarges them {plan.task.scale} times. Both must be the same."
        )
    return task


def _refuse_existing(path: str, plan: Plan) -> None:
    if os.path.lexists(path) and not (plan.keep or plan.overwrite):
        raise InputError(
            f"{path}: exists already. --keep keeps results of the same command and goes on, "
            "--overwrite replaces them; or choose another folder."
        )


def _is_done(path: str, made: dict[str, object], plan: Plan) -> bool:
    """Whether a file is there and is kept."""
    if plan.overwrite or not os.path.lexists(path):
        return False
    _refuse_existing(path, plan)
    found = made_of(path)
    if found != made:
        other = [name for name in made if found is None or found.get(name) != made[name]]
        what = "does not say how it was made" if found is None else f"differs in {', '.join(other)}"
        raise InputError(
            f"{path}: is not a result of this command, and cannot be kept: it {what}. Replace it "
            "with --overwrite, or choose another folder."
        )
    return True


def _open(job: _Job, plan: Plan) -> _Pair:
    """The image to restore, and the clean one in the size of the result."""
    scale, photo = plan.task.scale, read_photo(job.image)
    if job.clean is None:
        return _Pair(photo, None)
    if plan.degraded is None:
        height, width = photo.size
        clean = read_photo(job.clean)
        if (clean.size[0] // scale, clean.size[1] // scale) != photo.size:
            raise InputError(
                f"{job.clean}: has {clean.size[1]}x{clean.size[0]} pixels, {job.image} "
                f"{width}x{height}. They do not pair: for {plan.task.name} the clean image has "
                + (f"{scale} times as many on a side." if scale > 1 else "as many.")
            )
    else:
        # as released: grey ones as three equal channels, of which each gets noise of its own
        clean = replace(photo, grey=False)
        height, width = (side // scale for side in clean.size)
    clean = clean.cropped(height * scale, width * scale)
    border = scale if scale > 1 else 0
    if min(clean.size) < smallest_side(border):
        raise InputError(
            f"{job.clean}: has {clean.size[1]}x{clean.size[0]} pixels; to be scored it needs "
            f"{smallest_side(border)} on each side. Take it out of the set."
        )
    if plan.degraded is not None:
        seeds = [job.made["seed"]]
        pixels = degrade(clean.pixels[None], _degradation(plan), seeds)[0]
        return _Pair(replace(clean, pixels=pixels), clean)
    return _Pair(photo, clean)


# --- doing it


def _restore_one(
    job: _Job, plan: Plan, forward: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, float] | None:
    """Write the result of an image; its scores, where it has a clean counterpart."""
    degraded, clean = _open(job, plan)
    if job.done:
        result = read_photo(job.result)
    else:
        pixels = forward(degraded.pixels)
        if not pixels.isfinite().all():
            raise InputError(
                f"{job.image}: the network makes NaN or Inf of it, and nothing is written. Its "
                "training has diverged, or the checkpoint is damaged: take another one."
            )
        result = degraded.restored(pixels)
        write_photo(result, job.result, job.made)
    scale = plan.task.scale
    seen = degraded.pixels if scale == 1 else resize(degraded.pixels[None], scale)[0]
    scores = before = None
    if clean is not None:
        border = scale if scale > 1 else 0
        scores = score(result.pixels, clean.pixels, border)
        before = psnr_y(seen, clean.pixels, border)
    if job.picture:
        _draw(job, plan, seen, result, clean, scores, before)
    return None if scores is None else {"input_psnr_y": before, **scores._asdict()}


def _draw(
    job: _Job,
    plan: Plan,
    seen: torch.Tensor,
    result: Photo,
    clean: Photo | None,
    scores: Scores | None,
    before: float | None,
) -> None:
    titles = ["bicubic" if plan.task.scale > 1 else "input", "restored"]
    if scores is not None:
        titles = [f"{titles[0]}, {before:.2f} dB", f"{titles[1]}, {scores.psnr_y:.2f} dB"]
    panels = list(zip(titles, (seen, result.pixels)))
    if clean is not None:
        panels.append(("truth", clean.pixels))
    picture = compare(panels)
    write_photo(Photo.of(picture), job.picture, job.made)


def _report(scored: list[dict[str, object]], restorer: Restorer, plan: Plan) -> str:
    """Write OUT/scores.json; returns the same as a table."""
    names = [name for name in scored[0] if name != "image"]
    mean = {name: sum(entry[name] for entry in scored) / len(scored) for name in names}
    content = {
        "checkpoint": restorer.path,
        "checkpoint_sha256": restorer.sha256,
        "task": plan.task.name,
        "images": plan.images,
        "reference": plan.reference,
        "degraded": None if plan.degraded is None else _degradation(plan).name,
        "stride": plan.stride,
        "ensemble": plan.ensemble,
        "border": plan.task.scale if plan.task.scale > 1 else 0,
        "scores": [_finite(entry) for entry in scored],
        "mean": _finite(mean),
    }
    with atomic_path(os.path.join(plan.output, SCORES)) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
    header = ["image", "input PSNR Y", "PSNR Y", "PSNR RGB", "SSIM"]
    rows = [[entry["image"], *(entry[name] for name in names)] for entry in scored]
    rows.append([f"mean of {len(scored)}", *mean.values()])
    return tabulate(rows, header, floatfmt=("", ".2f", ".2f", ".2f", ".4f"), disable_numparse=[0])


def _finite(entry: dict[str, object]) -> dict[str, object]:
    """Infinity is no JSON: null stands where nothing differs."""
    return {
        key: None if isinstance(value, float) and math.isinf(value) else value
        for key, value in entry.items()
    }
