"""Which of the networks in a file is meant: told by its names, or by layout, copy and prefix."""

import re
from collections.abc import Iterable, Mapping

from virtex_d2.checkpoint.layouts import LAYOUTS, Copy, Found, Layout, find_resnets
from virtex_d2.engine.errors import InputError, nearest

_Option = tuple[Found, tuple[Layout, Copy]]


def choose(
    path: str, containers: Mapping[str, Mapping], layout: str = "", copy: str = "", prefix: str = ""
) -> _Option:
    """The ResNet to take of a file's state dicts (by place), and its layout and copy; arguments as
    in `source.read_backbone`.
    """
    known = {entry.name: entry for entry in LAYOUTS}
    if layout and layout not in known:
        raise InputError(
            f"layout '{layout}': expected one of {', '.join(known)}.{nearest(layout, known)}"
        )
    resnets = find_resnets({place: list(state) for place, state in containers.items()})
    if not resnets:
        raise InputError(_no_resnet(path, containers))
    if prefix:
        return _by_prefix(path, resnets, prefix, known.get(layout), copy)
    options = [(found, fit) for found in resnets for fit in found.layouts]
    if layout:
        options = [option for option in options if option[1][0].name == layout]
        options = options or _forced(path, resnets, known[layout])
    if not options:
        raise InputError(
            f"{path}: ResNets in places that no known layout has. {_say(resnets, resnets)}"
        )
    projects = {fit[0].name: None for _, fit in options}
    if len(projects) > 1:
        which = _say(resnets, (found for found, _ in options))
        raise InputError(f"{path}: fits several layouts: {', '.join(projects)}. {which}")
    entry = options[0][1][0]
    copies = [one.name for one in entry.copies]
    if copy and copy not in copies:
        raise InputError(
            f"copy '{copy}': layout {entry.name} has {', '.join(copies)}.{nearest(copy, copies)}"
        )
    wanted = copy or copies[0]
    taken = [option for option in options if option[1][1].name == wanted]
    if not taken:
        there = sorted({fit[1].name for _, fit in options})
        raise InputError(
            f"{path}: layout {entry.name} without its copy '{wanted}'; it holds {', '.join(there)}."
            " Choose it with --copy or VIRTEX.COPY."
        )
    if len(taken) > 1:
        raise InputError(
            f"{path}: the same network in several places. "
            f"{_say(resnets, (found for found, _ in taken))}"
        )
    return taken[0]


def _by_prefix(
    path: str, resnets: list[Found], prefix: str, layout: Layout | None, copy: str
) -> _Option:
    def ends(text: str) -> str:
        return text if text == "/" else text.rstrip(".")

    taken = [found for found in resnets if ends(prefix) == ends(found.place)]
    taken = taken or [found for found in resnets if ends(prefix) == ends(found.prefix)]
    if len(taken) != 1:
        how = "is of several ResNets" if taken else "is of none of the ResNets"
        raise InputError(f"{path}: prefix '{prefix}' {how}. {_say(resnets, taken or resnets)}")
    found = taken[0]
    if copy:
        raise InputError(
            f"{path}: --copy (VIRTEX.COPY) and --prefix (VIRTEX.PREFIX) both say which network; "
            "leave one out."
        )
    if layout and layout.naming is not found.naming:
        raise InputError(
            f"{path}: layout {layout.name} has {layout.naming.name}'s names, the ResNet of prefix "
            f"'{prefix}' has {found.naming.name}'s. Leave --layout (VIRTEX.LAYOUT) out."
        )
    fits = [fit for fit in found.layouts if layout in (None, fit[0])]
    if fits:
        return found, fits[0]
    named = [entry for entry in LAYOUTS if entry.naming is found.naming]
    plain = next((entry for entry in named if entry.name == found.naming.name), named[-1])
    return found, (layout or plain, Copy(ends(found.place), ""))


def _forced(path: str, resnets: list[Found], layout: Layout) -> list[_Option]:
    """A layout that was asked for: its copies behind any prefix, or the only ResNet there is."""
    fitting = [found for found in resnets if found.naming is layout.naming]
    options = [
        (found, (layout, copy))
        for found in fitting
        for copy in layout.copies
        if re.fullmatch(r"(.*\.)?" + copy.prefix, found.prefix)
        and re.fullmatch(copy.container, found.container)
    ]
    if options:
        return options
    if len(fitting) == 1:
        return [(fitting[0], (layout, layout.copies[0]))]
    raise InputError(f"{path}: no ResNet in layout {layout.name}. {_say(resnets, resnets)}")


def _say(resnets: list[Found], offered: Iterable[Found]) -> str:
    """The prefixes that can be given, each of which is one ResNet's."""
    prefixes = [found.prefix for found in resnets]
    names = [
        found.prefix if found.prefix and prefixes.count(found.prefix) == 1 else found.place
        for found in offered
    ]
    shown = ", ".join(dict.fromkeys(names))
    return f"Say which to take with --prefix (VIRTEX.PREFIX): {shown}"


def _no_resnet(path: str, containers: Mapping[str, Mapping]) -> str:
    if not containers:
        return f"{path}: holds no tensors by name. MODEL.WEIGHTS takes a checkpoint with a ResNet."
    place, state = max(containers.items(), key=lambda item: len(item[1]))
    first = ", ".join(list(state)[:3])
    what = "It looks like a vision transformer; " if any("blocks." in n for n in state) else ""
    return (
        f"{path}: no ResNet found among the {len(state)} tensors of {place or 'the top level'}, "
        f"which begin with {first}. {what}MODEL.WEIGHTS takes the layouts of docs/checkpoints.md."
    )
