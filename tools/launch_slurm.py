#!/usr/bin/env python
"""Submit a tool to a Slurm cluster; --help tells how."""

from virtex_d2.slurm.main import main

if __name__ == "__main__":
    main()
