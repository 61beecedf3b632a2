"""What is wrong with a detection data set, found before a run depends on it.

kinds.py      the kinds of problems, and which of them fail the check
boxes.py      boxes, and objects that are there twice
masks.py      polygons and run lengths
images.py     files: absent, damaged, of another size, there twice
leakage.py    images of the training sets among the evaluation's
check.py      all of it for one data set
page.py       the result as a printed page
listing.py    the result as JSON or CSV
sheet.py      a contact sheet with boxes and masks drawn
main.py       the order of the above, and the exit code
"""
