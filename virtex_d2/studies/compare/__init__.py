"""Initialisations compared: the same detectors trained from each, and a report with the spread.

plan.py       which runs, and the command of each
comparison.py the runs in their folder: done once, continued, reported
runs.py       a run's folder -> its config, curves, results and costs
leaks.py      test images that a start was pretrained on
tables.py     means, paired differences (../verdict.py); rows for people, CSV for programs
figures.py    curves, differences, classes, the same images
report.py     all of it in one HTML file
main.py       tools/compare_inits.py
"""
