"""tools/check_dataset.py: reads, checks, prints, and says whether all is well."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from virtex_d2.annotations.checks.check import Checked, check
from virtex_d2.annotations.checks.leakage import leaks
from virtex_d2.annotations.table import AnnotationTable
from virtex_d2.engine.errors import InputError
from virtex_d2.studies.check_dataset.listing import require_format, write_listing
from virtex_d2.studies.check_dataset.page import page
from virtex_d2.studies.check_dataset.sheet import draw_sheets, require_png

PROBLEMS_FOUND = 1  # exit code


@dataclass(frozen=True)
class Options:
    """What to do beyond the check of the annotations.

    Attributes:
        decode: decode images.
        sample: decode so many of each data set; 0: all.
        seed: of the samples that are drawn.
        workers: processes that decode.
        output: JSON or CSV file for all problems; "": none.
        contact_sheet: PNG for the drawn images; "": none.
        sheet_images: how many of each data set.
    """

    decode: bool = True
    sample: int = 0
    seed: int = 0
    workers: int = 1
    output: str = ""
    contact_sheet: str = ""
    sheet_images: int = 12


def run(
    train: Sequence[AnnotationTable],
    test: Sequence[AnnotationTable],
    options: Options,
    refused: str = "",
) -> int:
    """Check data sets and print a page on each; training sets are held against evaluation sets.

    Args:
        train, test: the data sets.
        options: what else to do.
        refused: why tools/train_net.py would not start on them; "" where it would.

    Returns:
        The exit code: 0, or 1 where there are serious problems or training would not start.
    """
    for name in ("sample", "sheet_images", "workers"):
        least = 0 if name == "sample" else 1
        if getattr(options, name) < least:
            raise InputError(
                f"--{name.replace('_', '-')} {getattr(options, name)}: expected at least {least}."
            )
    if options.output:
        require_format(options.output)
    if options.contact_sheet:
        require_png(options.contact_sheet)
    checked: list[list[Checked]] = [[], []]
    for tables, results in zip((train, test), checked):
        for table in tables:
            results.append(
                check(table, options.decode, options.sample, options.seed, options.workers)
            )
    for first, second in product(*checked):
        second.problems += leaks(first.table, second.table, first.decoded, second.decoded)
    every = [*checked[0], *checked[1]]
    for each in every:
        print(page(each, bool(refused)), end="\n\n")
    if train and test:
        print(_compared(options))
    if refused:
        print(f"tools/train_net.py would not start on this: {refused}")
    if options.output:
        write_listing(options.output, every)
        print(f"all problems: {options.output}")
    if options.contact_sheet:
        for path in draw_sheets(options.contact_sheet, every, options.sheet_images, options.seed):
            print(f"contact sheet: {path}")
    return 0 if not refused and all(each.sound for each in every) else PROBLEMS_FOUND


def _compared(options: Options) -> str:
    if not options.decode:
        how = "by file and file name only; without --no-images also by content"
    elif options.sample:
        how = "by file and file name; by content among the sampled images only"
    else:
        how = "by file and by content, pixel by pixel"
    return (
        f"Leakage between training and evaluation sets: compared {how}.\n"
        "Photographs that were scaled or compressed anew are not found."
    )
