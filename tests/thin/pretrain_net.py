"""Pretrain as tools/pretrain_net.py does, with a thin network for "resnet18"."""

import virtex_d2.engine.listening  # noqa: F401 - first, as in the tool

# isort: split

import argparse

from pretrain import main
from virtex_d2.engine.cli import run_tool


def thin_main(args: argparse.Namespace) -> None:
    """What each process runs."""
    from tests.thin.resnets import install

    install()
    main.main(args)


if __name__ == "__main__":
    run_tool(__doc__, thin_main)
