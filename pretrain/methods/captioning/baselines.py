"""What a model would reach that does not look at the image: the scale of a validation loss."""

from collections import Counter
from collections.abc import Iterable

import numpy as np

from pretrain.data.loader import CaptionDataset
from pretrain.methods.captioning.tokenizer import SPECIAL_PIECES
from pretrain.methods.classification.labels import ImageLabels


def unigram_entropy(dataset: CaptionDataset) -> float:
    """Entropy in nats of the tokens that are predicted (all but [SOS]).

    The loss of a captioner that knows the frequencies of words and nothing else.
    """
    counts: Counter[int] = Counter()
    for tokens in _captions(dataset):
        counts.update(tokens[1:])
    counts.pop(dataset.tokenizer.pad_id, None)  # <unk> is padding: the loss passes over it
    return _entropy(counts)


def label_entropy(dataset: CaptionDataset, labels: ImageLabels | None) -> float:
    """Loss in nats of the best classifier that answers the same for every image.

    With q the answer, the mean over labelled rows of the mean over a row's labels of -log q is
    smallest for q = the mean share of each label.

    Args:
        dataset: whose captions are scored.
        labels: classes of its images; None: each caption's pieces themselves.
    """
    shares: Counter[int] = Counter()
    if labels is None:
        rows: Iterable = ({t for t in c if t >= len(SPECIAL_PIECES)} for c in _captions(dataset))
    else:
        rows = (labels[i] for i in range(len(labels)))
    for row in rows:
        for label in row:
            shares[int(label)] += 1 / len(row)
    return _entropy(shares)


def _captions(dataset: CaptionDataset) -> Iterable[list[int]]:
    for record in dataset.records:
        for caption in record.captions:
            yield dataset.encode(caption)


def _entropy(counts: Counter[int]) -> float:
    share = np.array(list(counts.values())) / sum(counts.values())
    return float(-(share * np.log(share)).sum())
