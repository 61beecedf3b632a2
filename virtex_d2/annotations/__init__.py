"""Detection annotations as they are in their files, broken records included.

Training reads data sets through detectron2's catalog, which needs them to be sound. This is for
looking at them before that: what cannot be read of a record is a `Problem`, not an exception.

    table.py        the form that every format is read into: columns of numbers, records by index
    masks.py        polygons and run lengths, looked at before anything trusts them
    json_files.py   COCO and LVIS
    voc_folder.py   Pascal VOC
    sources.py      which reader; data sets of a config and of detectron2's catalog
"""
