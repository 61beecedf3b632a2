"""Captions of files against references: BLEU, ROUGE-L, CIDEr, METEOR and SPICE (pycocoevalcap).

What needs Java (the Penn Treebank tokenizer of COCO's protocol, METEOR, SPICE) runs in processes
of its own with a time limit; where there is none, that is said and the rest is computed.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain.data.formats import as_id, of_another_type
from pretrain.data.records import plain_name
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import read_json, read_text

# Captions of each image by its id: candidates have one, references one or more.
Captions = dict[int | str, list[str]]

PTB = "Penn Treebank (Stanford CoreNLP 3.4.1, as COCO's protocol has it)"
SIMPLE = "simple (lower case, runs of letters and digits; NOT comparable with published figures)"
JAVA_METRICS = ("METEOR", "SPICE")

# one with an apostrophe or a hyphen inside is one word
_WORD = re.compile(r"[^\s'\u2019-]+(?:['\u2019-][^\s'\u2019-]+)*")

# Scripts that write no spaces between words: Thai and Lao, Tibetan, Myanmar, Khmer, Tai Le to Tai
# Tham, Kana and Bopomofo, Han, and their extensions. A character is a letter with its marks.
_BLOCKS = (
    *((0x0E00, 0x0EFF), (0x0F00, 0x0FFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x1950, 0x19FF)),
    *((0x1A20, 0x1AAF), (0x3005, 0x3007), (0x3040, 0x312F), (0x31A0, 0x31FF), (0xA9E0, 0xA9FF)),
    *((0xAA60, 0xAADF), (0xFF66, 0xFF9F), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF)),
    (0x20000, 0x3FFFF),
)
_UNSPACED = "".join(f"{chr(first)}-{chr(last)}" for first, last in _BLOCKS)
_MARKS = "".join(
    char
    for first, last in _BLOCKS[:12]  # Han has none
    for char in map(chr, range(first, last + 1))
    if unicodedata.category(char)[0] == "M"
)
_CHARACTER = re.compile(f"[{_UNSPACED}][{_MARKS}]*")
UNSPACED_NOTE = (
    "Scripts without spaces between words (Han, Kana, Thai, Lao, Khmer, Myanmar, ...) are scored "
    "by character, not as COCO's tokenizer does, to which a sentence of them is one word."
)


@dataclass
class CaptionScores:
    """Metrics of a set of captions.

    Attributes:
        tokenizer: `PTB` or `SIMPLE`.
        scores: by name, as fractions (papers print them times 100; CIDEr goes to 10).
        missing: name of each metric that could not be computed -> why.
        note: what else there is to know about them.
    """

    tokenizer: str
    scores: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    note: str = ""


def score_captions(
    candidates: Captions, references: Captions, java_timeout: float = 600.0
) -> CaptionScores:
    """Score one caption an image against its references.

    BLEU-1 to BLEU-4 (Papineni et al. 2002), ROUGE-L (Lin 2004), CIDEr-D (Vedantam et al., arXiv
    1411.5726), METEOR 1.5 (Denkowski and Lavie 2014), SPICE (Anderson et al., arXiv 1607.08822);
    the last two for English alone. Texts are compared in NFC, those without spaces by character.

    Args:
        candidates: the same ids as `references`, as `read_predictions` checks.
        references: by image id.
        java_timeout: seconds that the tokenizer, METEOR and SPICE may take each.
    """
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        raise InputError(
            f"Metrics of captions need pycocoevalcap ({error}): pip install -r "
            "requirements-captions.txt"
        ) from error
    candidates, references = given = _spaced(candidates), _spaced(references)
    java = shutil.which("java")
    reason = "Java is not installed (no `java` on the PATH)"
    tokenized = None
    if java:
        try:
            tokenized = [_ptb(captions, java_timeout) for captions in (candidates, references)]
        except _JavaError as error:
            reason = f"the tokenizer failed: {error}"
    result = CaptionScores(PTB if tokenized else SIMPLE)
    foreign = _foreign(references)
    if any(_CHARACTER.search(t) for each in given for texts in each.values() for t in texts):
        result.note = UNSPACED_NOTE
    candidates, references = tokenized or [_simple(c) for c in (candidates, references)]
    bleu, _ = Bleu(4).compute_score(references, candidates, verbose=0)
    result.scores.update({f"BLEU-{n}": float(score) for n, score in enumerate(bleu, start=1)})
    result.scores["ROUGE-L"] = float(Rouge().compute_score(references, candidates)[0])
    if len(references) > 1:
        result.scores["CIDEr"] = float(Cider().compute_score(references, candidates)[0])
    else:
        result.missing["CIDEr"] = "it weighs words by how few images have them, and there is one"
    for name in JAVA_METRICS:
        if foreign:
            result.missing[name] = f"it is for English alone, and {foreign}"
            continue
        if not tokenized:
            result.missing[name] = reason
            continue
        try:
            result.scores[name] = _java_metric(name, candidates, references, java_timeout)
        except _JavaError as error:
            result.missing[name] = str(error)
    return result


class _JavaError(Exception):
    """A program that needs Java failed; the message says why."""


def _spaced(captions: Captions) -> Captions:
    """In NFC, with characters of `_BLOCKS` as words of their own."""
    return {
        image_id: [_CHARACTER.sub(r" \g<0> ", unicodedata.normalize("NFC", t)) for t in texts]
        for image_id, texts in captions.items()
    }


def _foreign(captions: Captions) -> str:
    """That most letters are of another script than English's; "" where they are not."""
    letters = [c for texts in captions.values() for text in texts for c in text if c.isalpha()]
    others = sum(not unicodedata.name(c, "").startswith("LATIN") for c in letters)
    return f"{others} of {len(letters)} letters are not Latin" if 2 * others > len(letters) else ""


def _simple(captions: Captions) -> Captions:
    return {
        image_id: [" ".join(_WORD.findall("".join(map(_letter, text.lower())))) for text in texts]
        for image_id, texts in captions.items()
    }


def _letter(char: str) -> str:
    """Letters and their marks, digits, and what may stand inside a word; a blank for the rest."""
    return char if char in "_'\u2019-" or unicodedata.category(char)[0] in "LMN" else " "


def _ptb(captions: Captions, timeout: float) -> Captions:
    """Tokenized as pycocoevalcap's PTBTokenizer does, without its files in the package's folder."""
    from pycocoevalcap.tokenizer import ptbtokenizer

    # one caption a line, whatever white space is in it
    lines = [" ".join(text.split()) for texts in captions.values() for text in texts]
    command = ["java", "-cp", ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR]
    command += ["-Dfile.encoding=UTF-8", "edu.stanford.nlp.process.PTBTokenizer"]
    command += ["-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
    folder = Path(ptbtokenizer.__file__).parent
    output = _run(command, "".join(f"{line}\n" for line in lines), timeout, cwd=folder)
    tokenized = output.split("\n")[:-1]
    if len(tokenized) != len(lines):
        raise _JavaError(f"{len(lines)} captions went in, {len(tokenized)} came out")
    kept = iter(
        " ".join(word for word in line.split() if word not in ptbtokenizer.PUNCTUATIONS)
        for line in tokenized
    )
    return {image_id: [next(kept) for _ in texts] for image_id, texts in captions.items()}


def _java_metric(name: str, candidates: Captions, references: Captions, timeout: float) -> float:
    """A metric of pycocoevalcap that starts Java, in a Python of its own that can be stopped."""
    script = Path(__file__).with_name("java_metric.py")
    # ids become numbers: SPICE sorts them, and COCO's and other ids do not compare
    numbered = [[texts[0], references[image_id]] for image_id, texts in candidates.items()]
    output = _run([sys.executable, str(script), name], json.dumps(numbered), timeout)
    return json.loads(output.splitlines()[-1])


def _run(command: list[str], text: str, timeout: float, cwd: Path | None = None) -> str:
    """Standard output of a program; it and all that it started are gone after `timeout` seconds.

    Raises:
        _JavaError: it failed or took too long.
    """
    process = subprocess.Popen(
        command,
        cwd=cwd,
        text=True,
        encoding="utf-8",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # a group of its own, to be ended with its children
    )
    try:
        output, errors = process.communicate(text, timeout)
    except subprocess.TimeoutExpired:
        raise _JavaError(f"it was not done after {timeout:g} s") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode:
        lines = [line for line in errors.splitlines() if line.strip()]
        raise _JavaError(lines[-1] if lines else f"exit code {process.returncode}")
    return output


# The files


def read_references(path: str) -> tuple[Captions, dict[str, list[int | str]]]:
    """Read a COCO captions file; the images themselves are not needed.

    Returns:
        Captions by image id, for images that have any; and ids by base name of `file_name`.
    """
    content = read_json(path)
    captions: Captions = {}
    names: dict[str, list[int | str]] = {}
    try:
        for annotation in content["annotations"]:
            captions.setdefault(_id(annotation["image_id"]), []).append(
                _text(annotation["caption"])
            )
        for image in content["images"]:
            base = os.path.basename(_text(image["file_name"]))
            names.setdefault(base, []).append(_id(image["id"]))
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{path}: expected COCO captions: `images` (id, file_name) and `annotations` "
            f"(image_id, caption); wrong or missing: {error}."
        ) from error
    if not captions:
        raise InputError(f"{path}: it has no captions.")
    return captions, names


def read_predictions(
    path: str, references: Captions, names: dict[str, list[int | str]]
) -> Captions:
    """Read one caption for each image of the references.

    Args:
        path: JSON lines with `caption` and `file` (as tools/caption_images.py writes) or
            `image_id`; or COCO results, a JSON list of `image_id` and `caption`.
        references, names: of `read_references`.
    """
    captions: Captions = {}
    for place, entry in _entries(path):
        if not isinstance(entry, dict) or not isinstance(entry.get("caption"), str):
            raise InputError(f"{path}: {place} has no `caption`: {json.dumps(entry)[:120]}")
        given = entry.get("image_id")  # null is not given
        image_id = _id_of(entry, names, path, place) if given is None else as_id(given)
        if image_id is None:
            raise InputError(f"{path}: {place}: `image_id` {given!r} is no number or text.")
        if image_id in captions:
            raise InputError(f"{path}: {place}: image {image_id} has a caption already.")
        captions[image_id] = [entry["caption"]]
    _compare(path, captions, references)
    return {image_id: captions[image_id] for image_id in references}


def _entries(path: str) -> list[tuple[str, Any]]:
    text = read_text(path)
    if text.lstrip().startswith("["):
        try:
            return [(f"entry {index}", entry) for index, entry in enumerate(json.loads(text))]
        except ValueError as error:
            raise InputError(f"{path}: expected a JSON list, but it is not: {error}.") from error
    entries = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                entries.append((f"line {number}", json.loads(line)))
            except ValueError as error:
                raise InputError(f"{path}: line {number} is not JSON: {error}.") from error
    return entries


def _id_of(entry: dict, names: dict[str, list[int | str]], path: str, place: str) -> int | str:
    name = os.path.basename(str(entry.get("file", "")))
    found = names.get(name, [])
    if len(found) != 1:
        what = f"{len(found)} images of the references are" if found else "no reference image is"
        near = next((n for n in names if not found and plain_name(n) == plain_name(name)), "")
        hint = f" There is {near!r}: names must be the same to the letter." if near else ""
        raise InputError(
            f"{path}: {place}: {what} called {name!r}.{hint} Give each entry the `image_id` of the "
            "references."
        )
    return found[0]


def _compare(path: str, captions: Captions, references: Captions) -> None:
    """Refuse predictions that are not of all the references' images, and of these alone."""
    without = [image_id for image_id in references if image_id not in captions]
    unknown = [image_id for image_id in captions if image_id not in references]
    problems = [
        f"{len(ids)} {what}: {', '.join(map(json.dumps, ids[:10]))}{', ...' * (len(ids) > 10)}"
        for ids, what in (
            (without, "images of the references have no caption"),
            (unknown, "image ids are not in the references"),
        )
        if ids
    ]
    if problems:
        advice = of_another_type(unknown, references) or "Both files must be of the same images."
        raise InputError(f"{path}: {'; '.join(problems)}. {advice}")


def _text(caption: Any) -> str:
    if not isinstance(caption, str):
        raise TypeError(f"{caption!r}, which is no text")
    return caption


def _id(value: Any) -> int | str:
    if (image_id := as_id(value)) is None:
        raise TypeError(f"the id {value!r}, which is no number or text")
    return image_id
