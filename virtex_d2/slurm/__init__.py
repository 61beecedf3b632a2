"""Jobs on a Slurm cluster: a script to read, submitted and followed with Slurm's own tools.

Needs no torch and no accounting database (sacct), and before it submits no Slurm.
"""
