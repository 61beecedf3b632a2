"""What every run stands on: errors, files, config, set-up, launch, checkpoints, compatibility.

The only part of `virtex_d2` that `pretrain` may import.
"""
