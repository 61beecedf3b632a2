"""How well a vocabulary fits the captions that it was trained on."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from pretrain.methods.captioning.tokenizer import SPECIAL_PIECES, Tokenizer, normalize_caption

LONGEST = 30  # tokens that VirTex keeps of a caption, [SOS] and [EOS] included
# A rule of thumb: the embedding of a piece that is seen more seldom is hardly trained.
SELDOM = 100
MOST = 0.5  # share of such pieces that makes a vocabulary too large


@dataclass(frozen=True)
class VocabularySummary:
    """A vocabulary on its captions. A caption's tokens are its pieces, [SOS] and [EOS].

    Attributes:
        captions: their number.
        pieces: of the vocabulary, special ones included.
        mean_tokens, p95_tokens, max_tokens: tokens a caption; the second is the 95th percentile.
        share_too_long: of captions with more than `LONGEST` tokens.
        unknown_tokens: <unk> in all captions.
        share_seldom: share of the pieces, special ones aside, that occur fewer than `SELDOM` times.
        share_unused: share of the same that never occur.
    """

    captions: int
    pieces: int
    mean_tokens: float
    p95_tokens: float
    max_tokens: int
    share_too_long: float
    unknown_tokens: int
    share_seldom: float
    share_unused: float

    def lines(self) -> list[str]:
        """The summary for people."""
        return [
            f"captions                     {self.captions}",
            f"pieces                       {self.pieces}",
            f"tokens a caption             {self.mean_tokens:.1f} on average, 95 % up to "
            f"{self.p95_tokens:.0f}, at most {self.max_tokens} ([SOS] and [EOS] included)",
            f"captions above {LONGEST} tokens     {self.share_too_long:.2%}",
            f"unknown tokens               {self.unknown_tokens}",
            f"pieces seen < {SELDOM} times      {self.share_seldom:.1%}",
            f"pieces never seen            {self.share_unused:.1%}",
        ]

    def warning(self) -> str:
        """What speaks against so many pieces; "" where nothing does."""
        if self.share_seldom < MOST:
            return ""
        return (
            f"{self.share_seldom:.0%} of the {self.pieces} pieces occur fewer than {SELDOM} times "
            f"in these {self.captions} captions: their embeddings will hardly be trained. A "
            "smaller --vocab-size suits so few captions better."
        )


def summarise(tokenizer: Tokenizer, captions: Iterable[str]) -> VocabularySummary:
    """Count what the tokenizer makes of captions, of which there is at least one."""
    counts: Counter[int] = Counter()
    lengths = []
    for caption in captions:
        ids = tokenizer.encode(caption)
        counts.update(ids)
        lengths.append(len(ids) + 2)
    tokens = np.array(lengths)
    seen = np.array([counts[i] for i in range(len(SPECIAL_PIECES), tokenizer.vocab_size)])
    return VocabularySummary(
        captions=len(tokens),
        pieces=tokenizer.vocab_size,
        mean_tokens=float(tokens.mean()),
        p95_tokens=float(np.percentile(tokens, 95)),
        max_tokens=int(tokens.max()),
        share_too_long=float((tokens > LONGEST).mean()),
        unknown_tokens=counts[Tokenizer.pad_id],
        share_seldom=float((seen < SELDOM).mean()),
        share_unused=float((seen == 0).mean()),
    )


def merge_warning(captions: Iterable[str]) -> str:
    """Which words become one where accents are stripped; "" where none do."""
    forms = defaultdict(list)
    for word in sorted({word for text in captions for word in normalize_caption(text).split()}):
        forms[normalize_caption(word, strip_accents=True)].append(word)
    merged = [" = ".join(words) for words in forms.values() if len(words) > 1]
    if not merged:
        return ""
    return (
        f"Without accents {len(merged)} words become the same as others: {', '.join(merged[:10])}. "
        "DATA.STRIP_ACCENTS False keeps them apart."
    )
