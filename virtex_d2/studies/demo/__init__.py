"""The demo: the whole line on a synthetic captioned world, and a report of what came out."""
