"""Learn an image by the classes of what it shows."""
