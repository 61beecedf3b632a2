"""Several sources of records as one sequence, with the weights that they are drawn by."""

import bisect
from collections.abc import Sequence

from pretrain.data.records import CaptionRecord, offsets


class MixedRecords(Sequence[CaptionRecord]):
    """The records of all sources, one source after the other.

    Args:
        parts: at least one source, none of them empty.
        weights: positive, one for each source; `pretrain.data.order` draws by them.
    """

    def __init__(self, parts: Sequence[Sequence[CaptionRecord]], weights: Sequence[float]):
        self.parts = parts
        self.weights = tuple(weights)
        self._firsts = offsets([len(part) for part in parts]).tolist()

    def __len__(self) -> int:
        return self._firsts[-1]

    def __getitem__(self, index: int) -> CaptionRecord:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        part = bisect.bisect_right(self._firsts, index) - 1
        return self.parts[part][index - self._firsts[part]]
