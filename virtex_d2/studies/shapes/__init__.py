"""A synthetic world: scenes of shapes, their masks and true captions, in all layouts."""

# Here because --help names them, and importing the world takes a while.
FORMATS = ("coco", "lvis", "voc")  # of annotation files
SMALLEST, LARGEST = 64, 512  # side of an image, in pixels
MOST_OBJECTS = 6  # in an image
