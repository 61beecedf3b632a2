"""Pictures of objects on images: the truth, predictions, and where the two agree.

    instances.py  one object, and its mask in every form that files have
    matching.py   predictions against the truth, as COCO's evaluation matches them
    drawing.py    objects on an image, with labels that can be read
    panels.py     images side by side with titles, and a legend
    results.py    predictions from files
    predict.py    predictions of a detector
    truth.py      the truth of a data set, image by image
    select.py     which images are shown, and in which order
    gallery.py    pictures and one HTML page of them

For others: `Instance`, `match`, `draw_instances`.
"""

from virtex_d2.studies.viewer.drawing import draw_instances
from virtex_d2.studies.viewer.instances import Instance
from virtex_d2.studies.viewer.matching import match

__all__ = ["Instance", "draw_instances", "match"]
