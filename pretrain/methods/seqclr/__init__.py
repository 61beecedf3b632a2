"""Learn to read words: contrast between the parts of two views, and decoders on what was learnt.

words, lmdb_words, located_words       sets of words in their published layouts, told by content
rendered, labels, check                words for tests; labels; what is wrong with a set
encoder                                a ResNet with a frame for four pixels of width, BiLSTMs
augmentation, loss, method             pretraining: two views, NT-Xent between their instances
decoders, recognizer, scores, reading  CTC and attention on frames, trained, scored, used
"""
