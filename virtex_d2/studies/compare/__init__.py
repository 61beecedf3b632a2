"""Initialisations compared: the same detectors trained from each, and a report with the spread.

plan.py       which runs, and the command of each
runs.py       a run's folder -> its config, curves, results and costs
collection.py folders of runs that were trained elsewhere
statistics.py means, paired differences and their confidence intervals
tables.py     rows for people, CSV for programs
figures.py    curves, differences, classes
report.py     all of it in one HTML file
main.py       the order of the above; `virtex_d2.studies.pipeline` runs the stages
"""
