"""The whole line on a synthetic captioned world: captions in, detector out, and a report.

python tools/demo.py --output demo

A demo that was stopped goes on where it was with the same command. What is complete is kept: the
same command with more --seeds runs only the new ones.
"""

import os
from pathlib import Path

from virtex_d2.engine.cli import program_parser
from virtex_d2.engine.errors import exit_on_input_error


@exit_on_input_error()
def main(root: Path) -> None:
    """Run tools/demo.py, in the project's folder `root`."""
    parser = program_parser(__doc__)
    parser.add_argument("--output", default="demo", help="folder of the demo (default: demo)")
    parser.add_argument(
        "--scale",
        type=float,
        default=os.environ.get("DEMO_SCALE") or 1.0,
        help="times the default iterations (default: $DEMO_SCALE or 1: minutes on two cores)",
    )
    parser.add_argument(
        "--seeds", type=int, default=1, help="repetitions, for a mean and a spread (default: 1)"
    )
    args = parser.parse_args()
    # after parsing: --help and a mistyped flag need not wait for torch
    from virtex_d2.studies.demo.line import run_demo
    from virtex_d2.studies.stages import exit_on_stop

    with exit_on_stop():
        run_demo(root, Path(args.output), args.scale, args.seeds)
