"""Check a detection data set: text, JSON, CSV and a page."""
