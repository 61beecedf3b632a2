"""The loop of docs/resuming.md, with a stand-in for the run."""

import os
import subprocess
import textwrap
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs" / "resuming.md"

# One start after the other does what the lines of `starts` say: the marker's content, or "-" for
# none, and the exit code.
PYTHON = """\
#!/bin/sh
echo start >> begun
next=$(head -n 1 starts)
sed -i 1d starts
[ -n "$next" ] || kill "$PPID"  # a loop without end
code=${next##* } marker=${next% *}
[ "$marker" = - ] || echo "$marker" > "$VIRTEX_REQUEUE_MARKER"
exit "$code"
"""
UNFINISHED = '{"iteration": 5, "requeue": true} 75'
BY_STOP = '{"iteration": 9, "requeue": false} 75'


def loop() -> str:
    text = DOCS.read_text(encoding="utf-8")
    begin = text.index("    export VIRTEX_REQUEUE_MARKER=")
    return textwrap.dedent(text[begin : text.index("    done\n", begin)]) + "done\n"


@pytest.mark.parametrize(
    ("starts", "marker_is_left"),
    [
        ([UNFINISHED, UNFINISHED, "- 0"], False),
        ([UNFINISHED, "- 2"], False),  # refused before it could remove the marker; it spun
        (["- 1"], False),
        ([UNFINISHED, BY_STOP], True),
    ],
)
def test_it_goes_on_while_the_run_says_that_it_has_to(starts, marker_is_left, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "output").mkdir()
    (tmp_path / "bin" / "python").write_text(PYTHON)
    (tmp_path / "bin" / "python").chmod(0o755)
    (tmp_path / "starts").write_text("\n".join(starts) + "\n")
    path = os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]])
    subprocess.run(
        ["bash", "-c", loop()], cwd=tmp_path, env={**os.environ, "PATH": path}, timeout=60
    )
    assert (tmp_path / "begun").read_text().split() == ["start"] * len(starts)
    assert (tmp_path / "output" / "unfinished.json").exists() == marker_is_left
