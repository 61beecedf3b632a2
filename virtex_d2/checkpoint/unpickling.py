"""What a pickle says, without doing it: a reader of pickles that has nothing to call.

A pickle is a program for a small stack machine, and Python's own machine calls whatever the program
names. The one here knows the same instructions, but a name stays a name: `rebuilding` writes down
what the few functions behind tensors, arrays and plain containers would have built, and every other
name gives a `Placeholder`. No module is imported, no attribute is looked up or set, and nothing
that came out of the file is called.

Reading takes time and memory in proportion to the file: lengths are compared with what the file
still holds before anything is allocated, the memo is a dict (so that a high index costs nothing),
the machine does not recurse, and what copies draws on a `Budget`.

The instructions are documented in Python's pickletools, whose readers of arguments are used.
"""

import codecs
import pickletools
import struct
from collections.abc import Callable
from typing import Any

from virtex_d2.checkpoint.stored import (
    BoundedFile,
    Budget,
    Damaged,
    Global,
    Placeholder,
    StoredArray,
    StoredDtype,
    checked_key,
)

_NEWEST_PROTOCOL = 5


class Unpickler:
    """Interprets one pickle. Strings of Python 2 are read as latin-1: arrays' bytes are in them.

    Args:
        file: where the pickle starts.
        budget: shared by all that is read of a file.
        foreign: takes the name of each class or function that gave a placeholder.
        rebuild: called with (this, a `Global`, the arguments), gives what the pickle's call of
            that class or function stands for.
        persistent: gives what a persistent id stands for; without it, one is damage.
    """

    def __init__(
        self,
        file: BoundedFile,
        budget: Budget,
        foreign: set[str],
        rebuild: Callable[["Unpickler", Global, tuple], Any],
        persistent: Callable[[Any], Any] | None = None,
    ):
        self.file = file
        self.budget = budget
        self.foreign = foreign
        self.rebuild = rebuild
        self.persistent = persistent
        self.stack: list = []
        self.marked: list[list] = []  # the stacks below each open mark
        self.memo: dict[int, Any] = {}

    def load(self) -> Any:
        """What the pickle builds: plain values, and the classes of `stored` for all else.

        Raises:
            Damaged: it is no whole pickle.
            Refused: it holds what is not read, or takes more than its budget.
        """
        name = "the pickle"
        try:
            while True:
                self.budget.step()
                code = self.file.read(1)
                if code not in _INSTRUCTIONS:
                    raise Damaged(f"{code!r} is no instruction of a pickle")
                name, read_argument, run = _INSTRUCTIONS[code]
                argument = read_argument(self.file) if read_argument else None
                if name == "STOP":
                    return self.stack.pop()
                run(self, argument)
        except (IndexError, KeyError):
            raise Damaged(f"{name} finds nothing to work on") from None
        except (ValueError, OverflowError, struct.error):
            raise Damaged(f"{name} has an impossible argument") from None

    def call(self, function: Any, arguments: Any) -> Any:
        """What stands for the result of a call that the pickle asks for."""
        if isinstance(function, Placeholder):  # the result of a foreign call, called again
            return function
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise Damaged(f"a call of a {type(function).__name__}")
        try:
            return self.rebuild(self, function, arguments)
        except (TypeError, AttributeError):
            raise Damaged(f"{function.label} with arguments that it does not take") from None

    def placeholder(self, cls: Global) -> Placeholder:
        """An inert stand-in for an object of a class; the class's name is noted."""
        self.foreign.add(cls.label)
        return Placeholder(cls.label)

    def fill_dict(self, target: Any, items: list) -> None:
        """Set keys and values, which alternate in `items`; a placeholder notes them."""
        if isinstance(target, Placeholder):
            target.note(zip(items[::2], items[1::2]))
            return
        if not isinstance(target, dict) or len(items) % 2:
            raise Damaged(f"keys and values for a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2]):
            target[checked_key(key)] = value

    def _fill_list(self, items: list) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Placeholder):
            raise Damaged(f"elements for a {type(target).__name__}")

    def _items_to_mark(self) -> list:
        items, self.stack = self.stack, self.marked.pop()
        return items

    # --- the instructions, by pickletools' names

    def _push(self, argument: Any) -> None:
        self.stack.append(argument)

    def _do_proto(self, version: int) -> None:
        if version > _NEWEST_PROTOCOL:
            raise Damaged(f"pickle protocol {version}; {_NEWEST_PROTOCOL} is the newest known")

    def _do_nothing(self, _: Any) -> None:
        """Frames help to read ahead, and what a buffer is for matters to writers only."""

    def _do_next_buffer(self, _: None) -> None:
        raise Damaged("some of its data was kept outside of the file")

    def _do_mark(self, _: None) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def _do_pop(self, _: None) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self._items_to_mark()

    def _do_pop_mark(self, _: None) -> None:
        self._items_to_mark()

    def _do_dup(self, _: None) -> None:
        self.stack.append(self.stack[-1])

    def _do_get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def _do_put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def _do_memoize(self, _: None) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _do_none(self, _: None) -> None:
        self.stack.append(None)

    def _do_newtrue(self, _: None) -> None:
        self.stack.append(True)

    def _do_newfalse(self, _: None) -> None:
        self.stack.append(False)

    def _do_empty_dict(self, _: None) -> None:
        self.stack.append({})

    def _do_empty_list(self, _: None) -> None:
        self.stack.append([])

    def _do_empty_set(self, _: None) -> None:
        self.stack.append(set())

    def _do_empty_tuple(self, _: None) -> None:
        self.stack.append(())

    def _do_tuple(self, _: None) -> None:
        items = tuple(self._items_to_mark())
        self.stack.append(items)

    def _do_tuple1(self, _: None) -> None:
        self.stack[-1] = (self.stack[-1],)

    def _do_tuple2(self, _: None) -> None:
        self.stack[-2:] = [(self.stack[-2], self.stack[-1])]

    def _do_tuple3(self, _: None) -> None:
        self.stack[-3:] = [(self.stack[-3], self.stack[-2], self.stack[-1])]

    def _do_list(self, _: None) -> None:
        items = self._items_to_mark()
        self.stack.append(items)

    def _do_dict(self, _: None) -> None:
        content: dict = {}
        self.fill_dict(content, self._items_to_mark())
        self.stack.append(content)

    def _do_frozenset(self, _: None) -> None:
        items = frozenset(map(checked_key, self._items_to_mark()))
        self.stack.append(items)

    def _do_append(self, _: None) -> None:
        item = self.stack.pop()
        self._fill_list([item])

    def _do_appends(self, _: None) -> None:
        self._fill_list(self._items_to_mark())

    def _do_setitem(self, _: None) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.fill_dict(self.stack[-1], [key, value])

    def _do_setitems(self, _: None) -> None:
        items = self._items_to_mark()
        self.fill_dict(self.stack[-1], items)

    def _do_additems(self, _: None) -> None:
        items = self._items_to_mark()
        target = self.stack[-1]
        if isinstance(target, set):
            target.update(map(checked_key, items))
        elif not isinstance(target, Placeholder):
            raise Damaged(f"set elements for a {type(target).__name__}")

    def _do_global(self, names: tuple[str, str]) -> None:
        self.stack.append(Global(*names))

    def _do_stack_global(self, _: None) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise Damaged("a name that is no text")
        self.stack.append(Global(module, name))

    def _do_extension(self, code: int) -> None:
        # The number of a class in a registry, which only the process that wrote the file had.
        self.stack.append(Global("copyreg", f"extension {code}"))

    def _do_reduce(self, _: None) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.stack.append(self.call(function, arguments))

    def _do_newobj_ex(self, _: None) -> None:
        self.stack.pop()  # keyword arguments; no class that is read has any
        self._do_reduce(None)

    def _do_inst(self, names: tuple[str, str]) -> None:
        arguments = tuple(self._items_to_mark())
        self._do_global(names)
        self.stack.append(self.call(self.stack.pop(), arguments))

    def _do_obj(self, _: None) -> None:
        cls, *arguments = self._items_to_mark()
        self.stack.append(self.call(cls, tuple(arguments)))

    def _do_build(self, _: None) -> None:
        """Give an array or a dtype its state; a placeholder notes it, all else drops it."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, StoredArray):
            if not isinstance(state, tuple) or len(state) != 5:
                raise Damaged("the state of an array in an unknown version")
            _, target.shape, target.dtype, is_fortran, target.data = state
            target.order = "F" if is_fortran else "C"
        elif isinstance(target, StoredDtype):
            if not isinstance(state, tuple) or len(state) < 5 or state[1] not in tuple("<>=|"):
                raise Damaged("the state of a dtype in an unknown version")
            target.order = state[1]
            target.is_structured = state[2] is not None or state[3] is not None
        elif isinstance(target, Placeholder):
            if isinstance(state, tuple) and state:  # with slots behind it
                state = state[0]
            if isinstance(state, dict):
                target.note(state.items())

    def _do_binpersid(self, _: None) -> None:
        self._do_persid(self.stack.pop())

    def _do_persid(self, pid: Any) -> None:
        if self.persistent is None:
            raise Damaged("it refers to data outside of itself")
        self.stack.append(self.persistent(pid))


def _read_line(file: BoundedFile) -> bytes:
    line = file.readline()
    if line[-1:] != b"\n":
        raise Damaged("a line without its end")
    return line[:-1]


def _read_string(file: BoundedFile) -> str:
    text = _read_line(file).strip()
    if len(text) < 2 or text[:1] not in (b"'", b'"') or text[-1:] != text[:1]:
        raise Damaged("a string without its quotes")
    return codecs.escape_decode(text[1:-1])[0].decode("latin-1")


def _read_names(file: BoundedFile) -> tuple[str, str]:
    return _read_line(file).decode(), _read_line(file).decode()


# Where pickletools' own readers take ASCII only: an array's bytes and some names are not.
_READERS = {"STRING": _read_string, "GLOBAL": _read_names, "INST": _read_names}
_PUSHED = (
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING "
    "UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8"
)
# Instructions that differ from another one in how their argument is written, or not at all.
_SAME = {
    "STOP": "nothing",
    "FRAME": "nothing",
    "READONLY_BUFFER": "nothing",
    "NEWOBJ": "reduce",
    **dict.fromkeys(("BINGET", "LONG_BINGET"), "get"),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), "put"),
    **dict.fromkeys(("EXT1", "EXT2", "EXT4"), "extension"),
}


def _instructions() -> dict[bytes, tuple[str, Callable | None, Callable]]:
    """Code -> name, what reads the argument, if any, and what runs it."""
    table = {}
    for opcode in pickletools.opcodes:
        name = opcode.name
        read_argument = _READERS.get(name) or (opcode.arg.reader if opcode.arg else None)
        if name in _PUSHED.split():
            run = Unpickler._push
        else:
            run = getattr(Unpickler, f"_do_{_SAME.get(name, name.lower())}")
        table[opcode.code.encode("latin-1")] = name, read_argument, run
    return table


_INSTRUCTIONS = _instructions()
