"""Captions of the synthetic world: a small grammar that says only what is true.

A sentence is drawn from several kinds (one object, a relation, a list, a count), each worded in
several ways, with attributes left out and ordered at random.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

CAPTIONS_PER_IMAGE = 5
# Words: "left" and "right" stand alone, so that a flipped image's caption can be flipped, too.
_RELATIONS = {
    "left": ("to the left of", "left of", "on the left side of"),
    "right": ("to the right of", "right of", "on the right side of"),
    "above": ("above", "over", "higher than"),
    "below": ("below", "under", "lower than"),
    "front": ("in front of", "partly covering", "overlapping"),
}
_OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
# Two objects are beside or above each other when their centres differ by this share of the image.
_APART = 8

_SIZES = {
    "small": ("small", "little", "tiny"),
    "medium": ("medium", "medium-sized"),
    "large": ("large", "big", "huge"),
}
_PATTERNS = {
    "plain": ("plain", "solid"),
    "striped": ("striped",),
    "checkered": ("checkered",),
    "dotted": ("dotted", "spotted"),
}
_PATTERN_TAILS = {
    "striped": ("with stripes",),
    "checkered": ("with a checkered pattern",),
    "dotted": ("with dots", "with spots"),
}
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
_PLURALS = {"cross": "crosses"}
_OPENINGS = (
    "{}",
    "there is {}",
    "{} in the picture",
    "we see {}",
    "the picture shows {}",
    "{} here",
    "here is {}",
    "{} can be seen",
)
_LISTS = ("{}", "a picture of {}", "we see {}", "{} together", "there is {}")
_TOTALS = ("{} objects, one of them {}", "{1} among {0} objects", "{} things, and one is {}")
_COUNTS = ("there {v} {n} {t}", "{n} {t}", "we count {n} {t}")


@dataclass(frozen=True)
class SceneObject:
    """One object as it is seen."""

    # name, color, size, pattern: words from CLASSES, COLORS, SIZES and PATTERNS
    name: str
    color: str
    size: str
    pattern: str
    center: tuple[int, int]  # (x, y) in pixels
    mask: np.ndarray  # (H, W) bool, the visible pixels
    box: tuple[int, int, int, int]  # (x, y, width, height) around them, in pixels
    covers: tuple[int, ...]  # indices of objects that it hides enough of to be seen, and to be said


def write_captions(
    rng: np.random.RandomState, objects: Sequence[SceneObject], size: int
) -> tuple[str, ...]:
    """Write five true captions; together they name every object, as far as five sentences can.

    Args:
        rng: the only source of chance.
        objects: from the back to the front, at least one.
        size: side of the image in pixels.
    """
    writer = _Writer(rng, objects, size)
    unnamed = [objects[i] for i in rng.permutation(len(objects))]
    captions = []
    for number in range(CAPTIONS_PER_IMAGE):
        subject = unnamed[0] if unnamed else writer.choose(objects)
        caption, named = writer.sentence(subject, len(unnamed) > CAPTIONS_PER_IMAGE - number)
        unnamed = [item for item in unnamed if all(item is not other for other in named)]
        captions.append(caption)
    return tuple(captions)


class _Writer:
    """Draws sentences about the objects of one image; each comes with the objects that it names."""

    def __init__(self, rng: np.random.RandomState, objects: Sequence[SceneObject], size: int):
        self._rng = rng
        self._objects = objects
        self._size = size

    def choose(self, items: Sequence) -> Any:
        return items[self._rng.randint(len(items))]

    def sentence(self, subject: SceneObject, must_list: bool) -> tuple[str, list[SceneObject]]:
        others = [item for item in self._objects if item is not subject]
        related = [
            (relation, other)
            for other in others
            for relation in _RELATIONS
            if self._holds(relation, subject, other)
        ]
        kinds = [self._one]
        if others:
            kinds += [self._list, self._list, self._count]
        if related:
            kinds += [self._relation] * 4
        if must_list:
            kinds = [self._list]
        return self.choose(kinds)(subject, others, related)

    def _holds(self, relation: str, first: SceneObject, second: SceneObject) -> bool:
        if relation == "front":
            return any(self._objects[i] is second for i in first.covers)
        dx, dy = (a - b for a, b in zip(first.center, second.center))
        offset = {"left": -dx, "right": dx, "above": -dy, "below": dy}[relation]
        across = abs(dy if relation in ("left", "right") else dx)
        return offset * _APART >= self._size and offset > across

    def _one(self, subject: SceneObject, others: list, related: list) -> tuple[str, list]:
        phrase = self._phrase(subject)
        return self.choose(_OPENINGS).format(phrase), [subject]

    def _list(self, subject: SceneObject, others: list, related: list) -> tuple[str, list]:
        count = min(len(others), 1 + self._rng.randint(2))
        named = [subject] + [others[i] for i in self._rng.permutation(len(others))[:count]]
        phrases = [self._phrase(item, brief=True) for item in named]
        joined = ", ".join(phrases[:-1]) + " and " + phrases[-1]
        return self.choose(_LISTS).format(joined), named

    def _count(self, subject: SceneObject, others: list, related: list) -> tuple[str, list]:
        kind = self._rng.randint(3)
        if kind == 0:  # all objects
            phrase = self._phrase(subject)
            return self.choose(_TOTALS).format(_NUMBERS[len(self._objects)], phrase), [subject]
        color = subject.color if kind == 1 else None
        same = [
            item
            for item in self._objects
            if item.name == subject.name and color in (None, item.color)
        ]
        noun = subject.name if len(same) == 1 else _PLURALS.get(subject.name, subject.name + "s")
        noun = f"{color} {noun}" if color else noun
        verb = "is" if len(same) == 1 else "are"
        return self.choose(_COUNTS).format(v=verb, n=_NUMBERS[len(same)], t=noun), same

    def _relation(self, subject: SceneObject, others: list, related: list) -> tuple[str, list]:
        relation, other = self.choose(related)
        first, second = self._phrase(subject), self._phrase(other, brief=True)
        words = self.choose(_RELATIONS[relation])
        templates = ["{a} {r} {b}", "{a} is {r} {b}", "there is {a} {r} {b}"]
        if relation in ("left", "right"):
            templates += [
                "{b} with {a} on its " + relation,
                "on the " + relation + " of {b} is {a}",
            ]
        elif relation in ("above", "below"):
            templates += ["{r} {b} we see {a}", "{b} is {o} {a}"]
        else:
            templates += ["{b} partly hidden by {a}", "{b} is behind {a}"]
        opposite = _OPPOSITE.get(relation)
        text = self.choose(templates).format(a=first, b=second, r=words, o=opposite)
        return text, [subject, other]

    def _phrase(self, item: SceneObject, brief: bool = False) -> str:
        """A noun phrase with some of the object's attributes."""
        says_color = self._rng.randint(10) < 8
        says_size = self._rng.randint(10) < (2 if brief else 4)
        says_pattern = self._rng.randint(10) < (2 if brief else 4)
        before, after = [], []
        if says_size:
            before.append(self.choose(_SIZES[item.size]))
        if says_pattern:
            tails = _PATTERN_TAILS.get(item.pattern)
            if tails and self._rng.randint(2):
                after.append(self.choose(tails))
            else:
                before.append(self.choose(_PATTERNS[item.pattern]))
        before = [before[i] for i in self._rng.permutation(len(before))]
        if says_color:
            if not after and self._rng.randint(5) == 0:
                after.append(f"that is {item.color}")
            else:
                before.append(item.color)
        phrase = " ".join([*before, item.name, *after])
        return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"
