"""Captions of the synthetic world: a small grammar that says only what is true.

A sentence is drawn from several kinds (one object, a relation, a list, a count), each worded in
several ways, with attributes left out and ordered at random. A caption carries its claims, so that
a test can hold them against the scene.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from virtex_d2.studies.shapes.world import SceneObject

CAPTIONS_PER_IMAGE = 5
# Words: "left" and "right" stand alone, so that a flipped image's caption can be flipped, too.
RELATIONS = ("left", "right", "above", "below", "front")
_OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
# Two objects are beside or above each other when their centres differ by this share of the image.
_APART = 8

_SIZE_WORDS = {
    "small": ("small", "little", "tiny"),
    "medium": ("medium", "medium-sized"),
    "large": ("large", "big", "huge"),
}
_PATTERN_WORDS = {
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
_RELATION_PHRASES = {
    "left": ("to the left of", "left of", "on the left side of"),
    "right": ("to the right of", "right of", "on the right side of"),
    "above": ("above", "over", "higher than"),
    "below": ("below", "under", "lower than"),
    "front": ("in front of", "partly covering", "overlapping"),
}


@dataclass(frozen=True)
class Description:
    """What a phrase says of an object; None where it says nothing."""

    name: str
    color: str | None = None
    size: str | None = None
    pattern: str | None = None

    def fits(self, item: SceneObject) -> bool:
        """Whether the object is as described."""
        return all(said is None or said == getattr(item, key) for key, said in vars(self).items())


@dataclass(frozen=True)
class Claim:
    """Something that a caption says.

    Attributes:
        kind: "object" (there is one), "relation" (first stands in it to second), or "count".
        first, second: descriptions.
        relation: one of RELATIONS.
        count: how many objects, of `name` and `color` where those are said.
        name, color: of the counted.
    """

    kind: str
    first: Description | None = None
    second: Description | None = None
    relation: str | None = None
    count: int = 0
    name: str | None = None
    color: str | None = None


@dataclass(frozen=True)
class Caption:
    """A sentence and its claims."""

    text: str
    claims: tuple[Claim, ...]


def holds(
    relation: str, first: SceneObject, second: SceneObject, size: int, objects: Sequence
) -> bool:
    """Whether `first` stands in `relation` to `second` in an image of `size` pixels a side."""
    if relation == "front":
        back = next(i for i, item in enumerate(objects) if item is second)
        return back in first.covers
    dx, dy = (a - b for a, b in zip(first.center, second.center))
    offset = {"left": -dx, "right": dx, "above": -dy, "below": dy}[relation]
    across = abs(dy if relation in ("left", "right") else dx)
    return offset * _APART >= size and offset > across


def write_captions(
    rng: np.random.RandomState, objects: Sequence[SceneObject], size: int
) -> tuple[Caption, ...]:
    """Five true captions; together they name every object, as far as five sentences can.

    Args:
        rng: the only source of chance.
        objects: from the back to the front, at least one.
        size: side of the image in pixels.
    """
    writer = _Writer(rng, objects, size)
    unnamed = [objects[i] for i in rng.permutation(len(objects))]
    captions = []
    for number in range(CAPTIONS_PER_IMAGE):
        subject = unnamed[0] if unnamed else _choose(rng, objects)
        caption, named = writer.sentence(subject, len(unnamed) > CAPTIONS_PER_IMAGE - number)
        unnamed = [item for item in unnamed if all(item is not other for other in named)]
        captions.append(caption)
    return tuple(captions)


class _Writer:
    def __init__(self, rng: np.random.RandomState, objects: Sequence[SceneObject], size: int):
        self._rng = rng
        self._objects = objects
        self._size = size

    def sentence(self, subject: SceneObject, must_list: bool) -> tuple[Caption, list[SceneObject]]:
        """A sentence about an object, and the objects that it names."""
        others = [item for item in self._objects if item is not subject]
        related = [
            (relation, other)
            for other in others
            for relation in RELATIONS
            if holds(relation, subject, other, self._size, self._objects)
        ]
        kinds = [self._one]
        if others:
            kinds += [self._list, self._list, self._count]
        if related:
            kinds += [self._relation] * 4
        if must_list:
            kinds = [self._list]
        return _choose(self._rng, kinds)(subject, others, related)

    def _one(self, subject: SceneObject, others: list, related: list) -> tuple[Caption, list]:
        phrase, description = self._phrase(subject)
        text = _choose(self._rng, _OPENINGS).format(phrase)
        return Caption(text, (Claim("object", description),)), [subject]

    def _list(self, subject: SceneObject, others: list, related: list) -> tuple[Caption, list]:
        count = min(len(others), 1 + self._rng.randint(2))
        named = [subject] + [others[i] for i in self._rng.permutation(len(others))[:count]]
        phrases, descriptions = zip(*(self._phrase(item, brief=True) for item in named))
        joined = ", ".join(phrases[:-1]) + " and " + phrases[-1]
        text = _choose(
            self._rng, ("{}", "a picture of {}", "we see {}", "{} together", "there is {}")
        ).format(joined)
        return Caption(text, tuple(Claim("object", d) for d in descriptions)), named

    def _count(self, subject: SceneObject, others: list, related: list) -> tuple[Caption, list]:
        kind = self._rng.randint(3)
        if kind == 0:  # all
            phrase, description = self._phrase(subject)
            number = _NUMBERS[len(self._objects)]
            template = _choose(
                self._rng,
                ("{} objects, one of them {}", "{1} among {0} objects", "{} things, and one is {}"),
            )
            claims = (Claim("count", count=len(self._objects)), Claim("object", description))
            return Caption(template.format(number, phrase), claims), [subject]
        color = subject.color if kind == 1 else None
        same = [
            item
            for item in self._objects
            if item.name == subject.name and color in (None, item.color)
        ]
        noun = subject.name if len(same) == 1 else _PLURALS.get(subject.name, subject.name + "s")
        noun = f"{color} {noun}" if color else noun
        verb = "is" if len(same) == 1 else "are"
        template = _choose(self._rng, ("there {v} {n} {t}", "{n} {t}", "we count {n} {t}"))
        text = template.format(v=verb, n=_NUMBERS[len(same)], t=noun)
        claim = Claim("count", count=len(same), name=subject.name, color=color)
        return Caption(text, (claim,)), same

    def _relation(self, subject: SceneObject, others: list, related: list) -> tuple[Caption, list]:
        relation, other = _choose(self._rng, related)
        first, first_described = self._phrase(subject)
        second, second_described = self._phrase(other, brief=True)
        words = _choose(self._rng, _RELATION_PHRASES[relation])
        templates = ["{a} {r} {b}", "{a} is {r} {b}", "there is {a} {r} {b}"]
        if relation in ("left", "right"):
            templates += [
                "{b} with {a} on its " + relation,
                "on the " + relation + " of {b} is {a}",
            ]
        elif relation in ("above", "below"):
            templates += ["{r} {b} we see {a}", "{b} is {o} {a}"]
        elif relation == "front":
            templates += ["{b} partly hidden by {a}", "{b} is behind {a}"]
        opposite = _OPPOSITE.get(relation)
        text = _choose(self._rng, templates).format(a=first, b=second, r=words, o=opposite)
        claims = (
            Claim("relation", first_described, second_described, relation),
            Claim("object", first_described),
            Claim("object", second_described),
        )
        return Caption(text, claims), [subject, other]

    def _phrase(self, item: SceneObject, brief: bool = False) -> tuple[str, Description]:
        """A noun phrase with some of the object's attributes, and what it says."""
        says_color = self._rng.randint(10) < 8
        says_size = self._rng.randint(10) < (2 if brief else 4)
        says_pattern = self._rng.randint(10) < (2 if brief else 4)
        description = Description(
            item.name,
            item.color if says_color else None,
            item.size if says_size else None,
            item.pattern if says_pattern else None,
        )
        before, after = [], []
        if says_size:
            before.append(_choose(self._rng, _SIZE_WORDS[item.size]))
        if says_pattern:
            tails = _PATTERN_TAILS.get(item.pattern)
            if tails and self._rng.randint(2):
                after.append(_choose(self._rng, tails))
            else:
                before.append(_choose(self._rng, _PATTERN_WORDS[item.pattern]))
        before = [before[i] for i in self._rng.permutation(len(before))]
        if says_color:
            if not after and self._rng.randint(5) == 0:
                after.append(f"that is {item.color}")
            else:
                before.append(item.color)
        phrase = " ".join([*before, item.name, *after])
        return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}", description


def _choose(rng: np.random.RandomState, items: Sequence) -> Any:
    return items[rng.randint(len(items))]
