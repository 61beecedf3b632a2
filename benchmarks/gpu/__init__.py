"""The steps of tools/check_gpu.py: what a site runs before it trusts a new machine."""
