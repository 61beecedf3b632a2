"""Every problem in a file, for programs."""

import csv
import json
import os
from collections.abc import Sequence

from virtex_d2.annotations.checks.check import Checked, summary
from virtex_d2.annotations.checks.kinds import KINDS
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import atomic_path

_FIELDS = ("dataset", "kind", "serious", "record", "image", "why")


def require_format(path: str | os.PathLike) -> None:
    """Raise InputError if the path ends neither in .json nor in .csv."""
    if os.path.splitext(path)[1] not in (".json", ".csv"):
        raise InputError(f"--output {path}: expected a name that ends in .json or .csv.")


def write_listing(path: str | os.PathLike, datasets: Sequence[Checked]) -> None:
    """Write all problems: as JSON with the counts of each data set, or as CSV, a problem a line."""
    require_format(path)
    try:
        with (
            atomic_path(path) as temporary,
            open(temporary, "w", encoding="utf-8", newline="") as f,
        ):
            if os.fspath(path).endswith(".json"):
                content = [{**summary(each), "records": _rows(each)} for each in datasets]
                json.dump({"datasets": content}, f, indent=1, ensure_ascii=False)
            else:
                writer = csv.DictWriter(f, _FIELDS)
                writer.writeheader()
                for each in datasets:
                    writer.writerows(_rows(each))
    except OSError as error:
        raise InputError(f"--output {path}: cannot be written: {error.strerror}.") from error


def _rows(checked: Checked) -> list[dict]:
    return [
        {
            "dataset": checked.table.name,
            "kind": problem.kind,
            "serious": KINDS[problem.kind].serious,
            "record": problem.record,
            "image": problem.image,
            "why": problem.why,
        }
        for problem in checked.problems
    ]
