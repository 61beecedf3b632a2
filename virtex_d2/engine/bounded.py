"""Reading a file that may lie: within its size, and within what its content may take."""

import os
from typing import BinaryIO

MAX_STEPS = 3_000_000  # reads of a pickle and values of its content; an R-50's takes 100 000


class Refused(Exception):  # noqa: N818  # the program is right, and so may be the file
    """The file holds what is not read. The message is one or more sentences about "it"."""


class Damaged(Exception):  # noqa: N818
    """The bytes are not what a program wrote. The message is the reason, in a few words."""


class Budget:
    """What reading one file may take in all: steps, and bytes beside those of the file."""

    def __init__(self, file_size: int):
        # Tied weights and views are copied, each of them; more than four copies of everything is
        # no checkpoint. The constant is for small files of broadcast tensors.
        self.limit = self.bytes_left = 4 * file_size + (64 << 20)
        self.steps_left = MAX_STEPS

    def spend(self, num_bytes: int) -> None:
        """Account for memory, before it is allocated."""
        self.bytes_left -= num_bytes
        if self.bytes_left < 0:
            raise Refused(
                f"its content would unfold to more than {self.limit >> 20} MiB, far more than the "
                "file has. Save copies of the tensors alone"
            )

    def step(self) -> None:
        """Account for a read of a pickle, or for a value of what it builds."""
        self.steps_left -= 1
        if self.steps_left < 0:
            raise Refused(
                f"it has more than {MAX_STEPS} values and instructions. Save the tensors alone, "
                "without long lists beside them"
            )


class BoundedFile:
    """An open file, from where it stands to its end.

    A read of more than is left fails before anything is allocated.
    """

    def __init__(self, file: BinaryIO, size: int, budget: Budget):
        self.file = file
        self.left = size - file.tell()
        self.budget = budget

    def read(self, length: int) -> bytes:
        self._take(length)
        return self.file.read(length)

    def readline(self) -> bytes:
        line = self.file.readline()
        self._take(len(line))
        if line[-1:] != b"\n":
            raise Damaged("a line without its end")
        return line

    def skip(self, length: int) -> int:
        """Move on, and return the place where it stood."""
        self._take(length)
        return self.file.seek(length, os.SEEK_CUR) - length

    def _take(self, length: int) -> None:
        self.budget.step()
        if not 0 <= length <= self.left:
            raise Damaged(f"{length:#x} more bytes should follow, and there are {self.left:#x}")
        self.left -= length
