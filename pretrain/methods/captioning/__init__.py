"""Learn an image by captioning it (VirTex, arXiv 2006.06666)."""
