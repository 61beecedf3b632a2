"""Frames to text: CTC and attention, as in clovaai's deep-text-recognition-benchmark.

Both compute in float32, whatever autocast says: they are small, and sums of logarithms are not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import nn

from pretrain.methods.seqclr.encoder import CONTEXT_SIZE, CONTEXTS, BiLSTM
from virtex_d2.engine.errors import InputError, nearest

BLANK = 0  # of CTC
GO, STOP = 0, 1  # of attention: what stands before the first letter, and behind the last
PAD = 0  # in rows of letters, which count from 1


@dataclass(frozen=True)
class Reading:
    """What was read in an image.

    Attributes:
        text: the letters.
        confidence: the probability of the choices that led to them, a greedy reader's.
    """

    text: str
    confidence: float


class Alphabet:
    """Letters and their numbers, from 1."""

    def __init__(self, letters: str):
        if len(set(letters)) != len(letters) or not letters:
            twice = sorted({letter for letter in letters if letters.count(letter) > 1})
            raise InputError(
                f"DECODER.ALPHABET {letters!r}: expected letters, each once; found "
                f"{f'{twice} twice' if twice else 'none'}."
            )
        self.letters = letters
        self._numbers = {letter: number for number, letter in enumerate(letters, 1)}

    def __len__(self) -> int:
        return len(self.letters)

    def encode(self, text: str) -> torch.Tensor:
        """(letters,) int64; letters that are not in the alphabet are left out."""
        known = [self._numbers[letter] for letter in text if letter in self._numbers]
        return torch.tensor(known, dtype=torch.int64)

    def decode(self, numbers: Sequence[int]) -> str:
        return "".join(self.letters[number - 1] for number in numbers)

    def unknown(self, text: str) -> set[str]:
        return {letter for letter in text if letter not in self._numbers}


class Decoder(nn.Module):
    """What both decoders have: an alphabet, kept with the weights, and a context of their own.

    Args:
        in_features: channels of a frame.
        alphabet: its letters.
        context: one of `encoder.CONTEXTS`: what frames pass first.
    """

    def __init__(self, in_features: int, alphabet: Alphabet, context: str):
        super().__init__()
        self.alphabet = alphabet
        codes = torch.tensor([ord(letter) for letter in alphabet.letters], dtype=torch.int32)
        self.register_buffer("letters", codes)
        self.context, self.in_features = nn.Sequential(), in_features
        if context == "bilstm":
            self.in_features = CONTEXT_SIZE
            self.context = nn.Sequential(
                BiLSTM(in_features, CONTEXT_SIZE, CONTEXT_SIZE),
                BiLSTM(CONTEXT_SIZE, CONTEXT_SIZE, CONTEXT_SIZE),
            )

    def loss(self, frames: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """(N, T, C), (N, L) int64 behind which `PAD` stands -> scalar, the mean over words."""
        with torch.autocast(frames.device.type, enabled=False):
            return self._loss(self.context(frames.float()), labels)

    @torch.no_grad()
    def read(self, frames: torch.Tensor) -> list[Reading]:
        """(N, T, C) -> what each image says, letter by letter the most probable."""
        probabilities = self.predict(frames).softmax(dim=2)  # (N, steps, classes)
        best, classes = probabilities.max(dim=2)
        return [self._reading(*row) for row in zip(classes.tolist(), best.log().tolist())]

    def predict(self, frames: torch.Tensor) -> torch.Tensor:
        """(N, T, C) -> (N, steps, classes) logits."""
        with torch.autocast(frames.device.type, enabled=False):
            return self._predict(self.context(frames.float()))

    def _loss(self, frames: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _predict(self, frames: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _reading(self, classes: list[int], logs: list[float]) -> Reading:
        raise NotImplementedError


class CTCDecoder(Decoder):
    """A linear layer on each frame (Graves et al., ICML 2006); class 0 is the blank."""

    def __init__(self, in_features: int, alphabet: Alphabet, context: str = "none"):
        super().__init__(in_features, alphabet, context)
        self.output = nn.Linear(self.in_features, len(alphabet) + 1)

    def _predict(self, frames: torch.Tensor) -> torch.Tensor:
        return self.output(frames)

    def _loss(self, frames: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Minus log-likelihood over the letters of a word, mean over words.

        A word that has no path through its frames counts 0.
        """
        log_probs = self.output(frames).log_softmax(dim=2).transpose(0, 1)  # (T, N, classes)
        length = torch.full((len(frames),), frames.shape[1], device=frames.device)
        letters = (labels != PAD).sum(dim=1)
        return F.ctc_loss(log_probs, labels, length, letters, BLANK, "mean", zero_infinity=True)

    def _reading(self, classes: list[int], logs: list[float]) -> Reading:
        kept = [
            number
            for before, number in zip([BLANK, *classes], classes)
            if number not in (BLANK, before)
        ]
        return Reading(self.alphabet.decode(kept), _probability(logs))


class AttentionCell(nn.Module):
    """One step: look at the frames, then say what comes next (Bahdanau et al., ICLR 2015)."""

    def __init__(self, in_features: int, hidden: int, classes: int):
        super().__init__()
        self.i2h = nn.Linear(in_features, hidden, bias=False)
        self.h2h = nn.Linear(hidden, hidden)
        self.score = nn.Linear(hidden, 1, bias=False)
        self.rnn = nn.LSTMCell(in_features + classes, hidden)
        self.classes = classes

    def forward(
        self,
        frames: torch.Tensor,
        projected: torch.Tensor,
        state: tuple[torch.Tensor, torch.Tensor],
        before: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the next state.

        Args:
            frames: (N, T, C).
            projected: (N, T, hidden), `i2h` of them.
            state: hidden and cell, (N, hidden) each.
            before: (N,) int64, the class before.
        """
        query = self.h2h(state[0])[:, None]  # (N, 1, hidden)
        weights = self.score(torch.tanh(projected + query)).softmax(dim=1)  # (N, T, 1)
        context = (weights * frames).sum(dim=1)  # (N, C)
        symbol = F.one_hot(before, self.classes).to(context.dtype)
        return self.rnn(torch.cat([context, symbol], dim=1), state)


class AttentionDecoder(Decoder):
    """Letter by letter: an LSTM that looks at the frames and knows the letter before.

    Classes: `GO`, `STOP`, then the letters. Of a loss each symbol of a word counts alike, and each
    word; the benchmark's mean is over all symbols of a batch.
    """

    def __init__(
        self,
        in_features: int,
        alphabet: Alphabet,
        context: str = "none",
        hidden: int = 256,
        max_length: int = 25,
    ):
        super().__init__(in_features, alphabet, context)
        self.attention_cell = AttentionCell(self.in_features, hidden, len(alphabet) + 2)
        self.generator = nn.Linear(hidden, len(alphabet) + 2)
        self.hidden = hidden
        self.steps = max_length + 1  # the last one says that the word ends

    def _predict(self, frames: torch.Tensor) -> torch.Tensor:
        """Each step is given the most probable symbol of the one before."""
        projected, state, before = self._start(frames)
        logits = []
        for _ in range(self.steps):
            state = self.attention_cell(frames, projected, state, before)
            logits.append(self.generator(state[0]))
            before = logits[-1].argmax(dim=1)
        return torch.stack(logits, dim=1)

    def _loss(self, frames: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of each symbol, given the right one before."""
        classes, wanted = self._targets(labels)
        projected, state, before = self._start(frames)
        hidden = []
        for step in range(wanted.shape[1]):
            state = self.attention_cell(frames, projected, state, before)
            hidden.append(state[0])
            before = wanted[:, step]
        logits = self.generator(torch.stack(hidden, dim=1))  # (N, L + 1, classes)
        each = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
        within = classes[:, :-1] != GO  # letters, and the end behind them
        within = torch.cat([torch.ones_like(within[:, :1]), within], dim=1)
        return (each.view_as(within) * within).sum(dim=1).div(within.sum(dim=1)).mean()

    def _targets(self, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, L) letters -> (N, L + 1) their classes or `GO` behind; and the same with `STOP`."""
        padded = F.pad(labels, (0, 1), value=PAD)
        classes = torch.where(padded == PAD, GO, padded + 1)
        return classes, torch.where(padded == PAD, STOP, classes)

    def _start(
        self, frames: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        zero = frames.new_zeros(len(frames), self.hidden)
        before = torch.full((len(frames),), GO, device=frames.device)
        return self.attention_cell.i2h(frames), (zero, zero), before

    def _reading(self, classes: list[int], logs: list[float]) -> Reading:
        end = classes.index(STOP) if STOP in classes else len(classes)
        letters = [number - 1 for number in classes[:end] if number != GO]
        return Reading(self.alphabet.decode(letters), _probability(logs[: end + 1]))


def _probability(logs: list[float]) -> float:
    return float(torch.tensor(logs, dtype=torch.float64).sum().exp())


DECODERS = ("ctc", "attention")


def add_decoder_config(cfg: CfgNode) -> None:
    """Add the group DECODER."""
    own = cfg.DECODER = type(cfg)()
    # "ctc" or "attention".
    own.NAME = "ctc"
    # What it writes: all letters, in the order of the outputs.
    own.ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"
    # What is made of labels: "lower", or "keep".
    own.CASE = "lower"
    # The longest word, in letters. CTC reads as many as there are frames, less one for each letter
    # that is doubled.
    own.MAX_LENGTH = 25
    # Of a training label with other letters, or longer: "refuse" the data, or "skip" the word.
    own.UNFIT = "refuse"
    # BiLSTMs before the decoder: "none", or "bilstm": two of them.
    own.CONTEXT = "none"
    # Channels of the attention's LSTM.
    own.HIDDEN_SIZE = 256


def check_decoder(cfg: CfgNode) -> None:
    """Refuse values of DECODER that cannot be."""
    own = cfg.DECODER
    known = {"NAME": DECODERS, "CASE": ("lower", "keep"), "UNFIT": ("refuse", "skip")}
    for key, values in {**known, "CONTEXT": CONTEXTS}.items():
        if own[key] not in values:
            raise InputError(
                f"DECODER.{key}: {own[key]!r} is not one of {', '.join(values)}."
                + nearest(own[key], values)
            )
    for key in ("MAX_LENGTH", "HIDDEN_SIZE"):
        if own[key] < 1:
            raise InputError(f"DECODER.{key}: expected 1 or more, found {own[key]}.")
    Alphabet(own.ALPHABET)
    if own.CASE == "lower" and own.ALPHABET != own.ALPHABET.lower():
        raise InputError(
            f"DECODER.ALPHABET {own.ALPHABET!r} has capital letters, which DECODER.CASE lower "
            "never gives. Set DECODER.CASE keep, or leave them out."
        )


def build_decoder(cfg: CfgNode, in_features: int) -> Decoder:
    """The decoder that DECODER describes, with random weights."""
    own = cfg.DECODER
    alphabet = Alphabet(own.ALPHABET)
    if own.NAME == "ctc":
        return CTCDecoder(in_features, alphabet, own.CONTEXT)
    return AttentionDecoder(in_features, alphabet, own.CONTEXT, own.HIDDEN_SIZE, own.MAX_LENGTH)


def frames_needed(text: str) -> int:
    """Frames that CTC needs for a text: one a letter, and a blank between two that are alike.

    >>> frames_needed("hello")
    6
    """
    return len(text) + sum(a == b for a, b in pairwise(text))
