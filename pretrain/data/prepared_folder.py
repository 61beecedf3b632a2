"""A folder of prepared images: what is in it, what is to do, and how far that has come.

Beside the images lie `prepared.json` (settings and counts) and `prepared.jsonl`, a line for each
image that is finished. A process that is killed anywhere leaves whole images and whole lines, but
for the last one, and the next goes on.
"""

import dataclasses
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from pretrain.data.prepare import Outcome, Settings, begin_worker, prepare_image
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import TEMPORARY_PREFIX, atomic_path, read_json
from virtex_d2.engine.folders import images_in
from virtex_d2.engine.lock import NAME as LOCK
from virtex_d2.engine.lock import RunLock

logger = logging.getLogger(__name__)

MANIFEST, JOURNAL = "prepared.json", "prepared.jsonl"
_FORMAT = "virtex_d2.prepared_images"
_CHUNK = 8  # images that a process takes at a time


@dataclass(frozen=True)
class Summary:
    """What a run came to.

    Attributes:
        counts: images by "resized", "copied" and "unreadable".
        already: how many of them were finished before this run.
        bytes_before, bytes_after: of all readable images.
        unreadable: name and reason of each.
    """

    counts: dict[str, int]
    already: int
    bytes_before: int
    bytes_after: int
    unreadable: list[tuple[str, str]]


def prepare_folder(
    source: str | os.PathLike, dest: str | os.PathLike, settings: Settings, workers: int = 1
) -> Summary:
    """Prepare every image of a folder and its subfolders (`pretrain.data.prepare.prepare_image`).

    Args:
        source: the folder; it is only read.
        dest: gets the same names. May hold what an earlier run of the same settings has left;
            images whose source has the size and the time that it had then are not done again.
        settings: size and quality.
        workers: processes.
    """
    source, dest = os.path.realpath(source), os.path.realpath(dest)
    if workers < 1:
        raise InputError(f"--workers {workers}: expected 1 or more.")
    if os.path.commonpath([source, dest]) == source:
        raise InputError(f"{dest}: lies in the images' folder {source}. Choose one beside it.")
    if not os.path.isdir(source):
        raise InputError(f"{source}: expected a folder of images, found none.")
    names = images_in(source)
    folder = _Folder(dest, settings)
    lost: list[InputError] = []
    try:
        os.makedirs(dest, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{dest}: cannot be made a folder: {error.strerror}. Choose another."
        ) from error
    lock = RunLock(dest, lost.append)
    lock.acquire()
    try:
        folder.begin()
        outcomes = folder.finished(source, names)
        already = len(outcomes)
        waiting = [name for name in names if name not in outcomes]
        logger.info("%s: %d images, %d of them finished before.", source, len(names), already)
        with folder.journal() as journal, _progress(len(names), already) as bar:
            for outcome in _prepared(waiting, source, dest, settings, workers):
                if lost:
                    raise lost[0]
                outcomes[outcome.name] = outcome
                journal.write(json.dumps(dataclasses.asdict(outcome)) + "\n")
                journal.flush()
                bar.update()
                if outcome.what == "unreadable":
                    logger.warning("%s: it is left out: %s", outcome.name, outcome.reason)
        summary = _summary([outcomes[name] for name in names], already)
        folder.finish(source, summary)
    finally:
        lock.release()
    return summary


class _Folder:
    """What is known of the folder that is written."""

    def __init__(self, path: str, settings: Settings):
        self._path = Path(path)
        self._head = {"format": _FORMAT, "version": 1, "settings": dataclasses.asdict(settings)}
        if (self._path / MANIFEST).is_file():
            self._compare(read_json(self._path / MANIFEST))
        elif self._path.is_dir() and not all(_is_passing(p.name) for p in self._path.iterdir()):
            raise InputError(
                f"{path}: expected an empty folder or one of prepared images, found something else "
                "in it. Choose another."
            )

    def begin(self) -> None:
        """Say what the folder will be, and remove what a killed run was writing."""
        for folder, _, files in os.walk(self._path):
            for file in files:
                if file.startswith(TEMPORARY_PREFIX):
                    os.unlink(os.path.join(folder, file))
        self._write({**self._head, "finished": False})

    def _compare(self, manifest: dict) -> None:
        if manifest.get("format") != _FORMAT or manifest.get("version") != 1:
            raise InputError(
                f"{self._path / MANIFEST}: expected the format {_FORMAT} 1, found "
                f"{manifest.get('format')} {manifest.get('version')}. Choose another folder."
            )
        found, wanted = manifest.get("settings"), self._head["settings"]
        if found != wanted:
            raise InputError(
                f"{self._path}: its images were prepared with {found}, not with {wanted}. Use "
                "those settings, or another folder."
            )

    def _write(self, manifest: dict) -> None:
        with atomic_path(self._path / MANIFEST) as temporary:
            temporary.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")

    def finished(self, source: str, names: list[str]) -> dict[str, Outcome]:
        """By name: what is done, and whose source is as it was."""
        path = self._path / JOURNAL
        if not path.is_file():
            return {}
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):  # the last run was killed while it wrote a line
            os.truncate(path, len(whole))
        lines: dict[str, Outcome] = {}
        try:
            for line in whole.splitlines():
                outcome = Outcome(**json.loads(line))
                lines[outcome.name] = outcome
        except (ValueError, TypeError) as error:
            raise InputError(
                f"{path}: expected an image's outcome in each line, found {line[:80]!r}. Remove "
                "the file: all images are then prepared again."
            ) from error
        gone = sorted(lines.keys() - set(names))
        if gone:
            logger.warning(
                "%s: %d of its images are not in %s (any more); they stay. The first: %s.",
                self._path,
                len(gone),
                source,
                ", ".join(gone[:3]),
            )
        return {n: lines[n] for n in names if n in lines and self._is_current(source, lines[n])}

    def _is_current(self, source: str, outcome: Outcome) -> bool:
        try:
            origin = os.stat(os.path.join(source, outcome.name))
            result = os.stat(self._path / outcome.name)
        except OSError:  # unreadable ones are tried again
            return False
        known = (outcome.size, outcome.mtime_ns, outcome.bytes)
        return known == (origin.st_size, origin.st_mtime_ns, result.st_size)

    def journal(self):
        """The open journal, behind its last line."""
        return open(self._path / JOURNAL, "a", encoding="utf-8")

    def finish(self, source: str, summary: Summary) -> None:
        self._write(
            {
                **self._head,
                "finished": True,
                "source": source,
                "counts": summary.counts,
                "bytes_before": summary.bytes_before,
                "bytes_after": summary.bytes_after,
                "unreadable": [name for name, _ in summary.unreadable],
            }
        )


def _is_passing(name: str) -> bool:
    """Whether a file is there only while a run writes, or was killed."""
    return name.startswith(TEMPORARY_PREFIX) or name == LOCK


def _prepared(
    names: list[str], source: str, dest: str, settings: Settings, workers: int
) -> Iterator[Outcome]:
    """Outcomes in the names' order."""
    count = len(names)
    arguments = (names, [source] * count, [dest] * count, [settings] * count)
    if workers == 1:
        yield from map(prepare_image, *arguments)
        return
    pool = ProcessPoolExecutor(
        workers,
        mp_context=get_context("spawn"),
        initializer=begin_worker,
        initargs=(os.getpid(),),
    )
    try:
        yield from pool.map(prepare_image, *arguments, chunksize=_CHUNK)
    except BrokenProcessPool as error:
        raise InputError(
            f"{dest}: a process was killed, probably for its memory. Run the same command again, "
            "with fewer --workers: it goes on from here."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _progress(total: int, already: int) -> tqdm:
    return tqdm(
        total=total,
        initial=already,
        desc="images",
        unit="image",
        file=sys.stderr,
        mininterval=0.5 if sys.stderr.isatty() else 10,
    )


def _summary(outcomes: list[Outcome], already: int) -> Summary:
    counts = Counter(outcome.what for outcome in outcomes)
    readable = [outcome for outcome in outcomes if outcome.what != "unreadable"]
    return Summary(
        {what: counts[what] for what in ("resized", "copied", "unreadable")},
        already,
        sum(outcome.size for outcome in readable),
        sum(outcome.bytes for outcome in readable),
        [(outcome.name, outcome.reason) for outcome in outcomes if outcome.what == "unreadable"],
    )
