"""Importing this is a tool's first act: signals are noted while the other imports take seconds."""

from virtex_d2.engine.signals import listen

listen()
