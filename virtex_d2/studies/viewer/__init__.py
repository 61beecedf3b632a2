"""Pictures of objects on images: the truth, predictions, and where the two agree.

matching.py   objects, and predictions matched to them as COCO's evaluation does
drawing.py    objects on an image, with labels that can be read; images side by side
results.py    predictions from files or of a detector
gallery.py    pictures and one HTML page of them
main.py       the command line of tools/visualize_results.py
"""
