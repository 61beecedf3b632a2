"""Records of images and their captions, read, ordered and loaded."""
