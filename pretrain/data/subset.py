"""Smaller sets inside larger ones: a fraction of the images, some captions of each."""

import numpy as np

from pretrain.data.records import Records
from virtex_d2.engine.errors import InputError


def take_fraction(
    records: Records, fraction: float = 1.0, captions_per_image: int = 0, seed: int = 0
) -> Records:
    """The first images of a random order, in the records' order, with some captions of each.

    Subsets of one seed are nested: 10 % of the images are among 20 %, and a single caption of an
    image is one of its two. Which captions an image keeps does not depend on the fraction.

    Args:
        records: all.
        fraction: of the images, rounded to the nearest number.
        captions_per_image: at most so many of each; 0 keeps all.
        seed: of the order, not negative.
    """
    check_subset(fraction, captions_per_image)
    if fraction == 1 and captions_per_image == 0:
        return records
    count = round(fraction * len(records))
    if count == 0:
        raise InputError(
            f"DATA.FRACTION {fraction} of {len(records)} images is none: use at least "
            f"{1 / len(records):.2g}."
        )
    images = np.sort(np.random.default_rng([seed, 0]).permutation(len(records))[:count])
    captions = np.ones(records.num_captions, bool)
    if captions_per_image:
        captions = _ranks_within(records, seed) < captions_per_image
    return records.select(images, captions)


def check_subset(fraction: float, captions_per_image: int) -> None:
    """Raise InputError if the fraction is not in (0, 1], or fewer than 0 captions are asked for."""
    if not 0 < fraction <= 1:
        raise InputError(f"DATA.FRACTION {fraction}: expected more than 0, up to 1 for all.")
    if captions_per_image < 0:
        raise InputError(
            f"DATA.CAPTIONS_PER_IMAGE {captions_per_image}: expected 0 for all, or more."
        )


def _ranks_within(records: Records, seed: int) -> np.ndarray:
    """(captions,) int64: each caption's place in a random order of its image's captions."""
    luck = np.random.default_rng([seed, 1]).random(records.num_captions)
    image_of = np.repeat(np.arange(len(records)), np.diff(records.firsts))
    order = np.lexsort((luck, image_of))  # by image, then by luck: images keep their places
    ranks = np.empty(records.num_captions, np.int64)
    ranks[order] = np.arange(records.num_captions) - records.firsts[image_of]
    return ranks
