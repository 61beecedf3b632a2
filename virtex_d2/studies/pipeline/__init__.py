"""Longer lines of work as stages: a process each, done once, continued where they stopped."""
