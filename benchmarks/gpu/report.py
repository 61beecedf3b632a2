"""The check's results in words: a line for each step, and a page for all."""

from typing import Any

from .plan import STEPS

_LONG = ("machine", "packages")  # the one is on top, the other in the JSON alone


def line(name: str, result: dict[str, Any]) -> str:
    """Such as "PASS  timing        41 s  3 012 images/s at 256"; of a failure what has failed."""
    failed = [check for check in result.get("checks", []) if not check["passed"]]
    told = "; ".join(f"{check['name']}: {check['told']}" for check in failed)
    told = told or result.get("headline", "")
    return f"{result['state']:8} {name:12} {result.get('seconds', 0):6.0f} s  {_one_line(told)}"


def summary(found: dict[str, Any]) -> str:
    """A page of Markdown: the table of steps, then of each step its checks, figures and notes."""
    steps = found["steps"]
    machine = steps.get("environment", {}).get("figures", {}).get("machine", {})
    passed = [name for name, result in steps.items() if result["state"] == "PASS"]
    verdict = "passed" if found["passed"] else "NOT passed"
    lines = [
        f"# GPU check: {verdict}",
        "",
        f"{', '.join(f'{key} {value}' for key, value in machine.items()) or 'machine: not asked'}",
        f"{found['started']}; {len(passed)} of {len(steps)} steps passed.",
        "",
        "| step | | seconds | figure |",
        "|---|---|---|---|",
    ]
    for name, result in steps.items():
        told = _one_line(line(name, result).split(" s  ", 1)[-1])
        lines.append(f"| {name} | {result['state']} | {result.get('seconds', '')} | {told} |")
    for name, result in steps.items():
        if not result.get("checks"):
            continue
        what = STEPS[name].what if name in STEPS else "several processes"
        lines += ["", f"**{name}** ({what})", ""]
        for check in result["checks"]:
            told = f": {_one_line(check['told'])}" if check["told"] else ""
            lines.append(f"- {'' if check['passed'] else '**FAIL** '}{check['name']}{told}")
        figures = {k: v for k, v in result["figures"].items() if k not in _LONG}
        lines += [f"- {key}: {_figure(value)}" for key, value in figures.items()]
        lines += [f"- *{_one_line(note)}*" for note in result["notes"]]
    return "\n".join(lines) + "\n"


def _one_line(text: str) -> str:
    text = " ".join(text.split()).replace("|", "/")
    return text if len(text) <= 240 else text[:237] + "..."


def _figure(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_figure(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(_figure, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
