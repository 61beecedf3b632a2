"""Learn to read words: contrast between the parts of two views, and decoders on what was learnt."""
