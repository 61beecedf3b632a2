"""Detection annotations as they are in their files, broken records included.

What cannot be read of a record is a `Problem`, not an exception: training refuses a data set for
some kinds of them, tools/check_dataset.py shows all.

    table.py    the form that every format is read into: columns of numbers, records by index
    records.py  one typed reading of COCO's and LVIS's JSON
    coco.py     that as a table
    voc.py      Pascal VOC as a table
    masks.py    polygons and run lengths, looked at before anything trusts them
    checks.py   what is wrong with boxes, masks, images, and between data sets
    usable.py   what of it keeps a run from starting
"""
