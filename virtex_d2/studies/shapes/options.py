"""What the synthetic world can be asked for; imports nothing, for the sake of --help."""

FORMATS = ("coco", "lvis", "voc")  # of annotation files
SMALLEST, LARGEST = 64, 512  # side of an image, in pixels
MOST_OBJECTS = 6  # in an image
