"""Importing this is a tool's first act: signals are noted while the other imports take seconds."""

from .signals import listen

listen()
