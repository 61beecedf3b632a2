"""A synthetic world: scenes of shapes, their masks and true captions, in all layouts."""
