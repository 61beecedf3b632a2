"""Train a decoder on an encoder's frames, frozen or fine-tuned, and say how well it reads."""

import csv
import dataclasses
import json
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm

from pretrain.data.loader import Samples, ValSet, Visit
from pretrain.data.records import CaptionRecord
from pretrain.export import Exported, load_weights
from pretrain.methods.method import Batch, Method
from pretrain.methods.seqclr.augmentation import (
    ViewDraws,
    add_augmentation_config,
    augment,
    check_augmentation,
)
from pretrain.methods.seqclr.decoders import (
    Alphabet,
    add_decoder_config,
    build_decoder,
    check_decoder,
)
from pretrain.methods.seqclr.encoder import (
    add_encoder_config,
    build_encoder,
    check_encoder,
    gather_statistics,
    load_encoder,
)
from pretrain.methods.seqclr.labels import fitting_words, labelled_words
from pretrain.methods.seqclr.method import SeqCLR
from pretrain.methods.seqclr.scores import (
    add_score_config,
    check_scores,
    compared,
    score_words,
    with_case,
)
from pretrain.methods.seqclr.words import WordSet, open_words, some_pixels, word_pixels
from pretrain.transforms import normalize, upload
from virtex_d2.engine.backbone_file import IMAGENET_RGB
from virtex_d2.engine.checkpointer import has_checkpoint, last_whole_checkpoint
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import atomic_path
from virtex_d2.engine.frozen import fingerprint, require_untouched
from virtex_d2.engine.safe_load import read_checkpoint, read_stored

logger = logging.getLogger(__name__)

FORMAT = "virtex_d2.word_recognizer"
VERSION = "1"
LETTERS = "decoder.letters"  # where a state dict has its alphabet
PREDICTIONS, SCORES = "predictions.tsv", "scores.json"
COLUMNS = ("set", "image", "label", "read", "confidence", "right")


class Recognizer(Method):
    """Read words: frames of an encoder, then CTC or attention.

    SeqCLR (arXiv 2012.10873, section 4) judges an encoder by decoders that are trained on its
    frozen frames, and by fine-tuning all of it on a fraction of the labels.
    """

    losses = ("loss_decoder",)
    metrics = ("word_accuracy", "ed1", "one_minus_ned")

    def __init__(self, cfg: CfgNode, num_outputs: int):
        super().__init__(cfg, num_outputs)
        self.cfg = cfg
        self.encoder = build_encoder(cfg)
        self.decoder = build_decoder(cfg, self.encoder.out_features)
        self.frozen = cfg.ENCODER.FREEZE
        self.encoder.requires_grad_(not self.frozen)
        self.radius = ViewDraws(cfg.DECODER).radius
        self._fingerprint = ""  # of a frozen encoder, when training began
        self._rows: list[Prediction] = []  # of the validation that is going on

    @staticmethod
    def add_config(cfg: CfgNode) -> None:
        add_encoder_config(cfg)
        # What the encoder starts from: encoder.safetensors, or a ResNet of any checkpoint that a
        # detector takes. Empty: random weights.
        cfg.ENCODER.WEIGHTS = ""
        # Train the decoder alone. The encoder stays in evaluation mode, and as it was to the bit.
        cfg.ENCODER.FREEZE = True
        # Gather a frozen encoder's running statistics anew, on that many words of DATA.WORDS,
        # before training begins; 0: leave them as they are. For comparing starts: those of a random
        # encoder fit nothing.
        cfg.ENCODER.STATISTICS_WORDS = 0
        add_decoder_config(cfg)
        # Mild views to train on: contrast, blur and crops, of which 0 to all are drawn.
        add_augmentation_config(cfg.DECODER)
        cfg.DECODER.STYLE = False
        cfg.DECODER.AUGMENT.NUMBER = (0, 5)
        for change in ("SHARPEN", "WARP", "PERSPECTIVE"):
            cfg.DECODER.AUGMENT[change] = (0.0, 0.0)
        add_score_config(cfg)

    @staticmethod
    def check(cfg: CfgNode) -> None:
        check_encoder(cfg)
        count = cfg.ENCODER.STATISTICS_WORDS
        if count < 0 or (count and not cfg.ENCODER.FREEZE):
            raise InputError(
                f"ENCODER.STATISTICS_WORDS {count}: expected 0, or with ENCODER.FREEZE True how "
                "many words to gather statistics on; an encoder that trains gathers its own."
            )
        check_decoder(cfg)
        check_augmentation(cfg.DECODER, "DECODER")
        check_scores(cfg)

    @classmethod
    def own_records(cls, cfg: CfgNode, train: bool) -> Sequence[CaptionRecord] | None:
        records = open_words(cfg, train, partial(_usable, cfg, train))
        if records is None and train:
            raise InputError("DATA.WORDS is empty: name sets of words with labels to learn from.")
        return records or []

    @classmethod
    def build_samples(
        cls, cfg: CfgNode, train: Sequence[CaptionRecord] | None, val: Sequence[CaptionRecord]
    ) -> "LabelledWords":
        if not train:  # to evaluate only
            path = cfg.MODEL.WEIGHTS
            if not path and has_checkpoint(cfg.OUTPUT_DIR):
                path = last_whole_checkpoint(cfg.OUTPUT_DIR)
            if path:
                require_recognizer(path, cfg)
        return LabelledWords(cfg, val)

    def load_start(self, cfg: CfgNode, identity: Mapping[str, str]) -> None:
        """Load a whole recognizer, or an encoder, or nothing."""
        whole, encoder = cfg.MODEL.WEIGHTS, cfg.ENCODER.WEIGHTS
        if whole and encoder:
            raise InputError(
                f"MODEL.WEIGHTS {whole} and ENCODER.WEIGHTS {encoder}: the former, a whole "
                "recognizer, has an encoder. Give one of them."
            )
        if whole:
            require_recognizer(whole, cfg)
            load_weights(self, read_stored(whole), identity, self.fresh)
        elif encoder:
            load_encoder(self.encoder, encoder, cfg)
        else:
            logger.info("ENCODER.WEIGHTS is empty: the encoder begins with random weights.")
            if self.frozen and not cfg.ENCODER.STATISTICS_WORDS:
                logger.warning(
                    "A frozen encoder whose running statistics were never gathered: set "
                    "ENCODER.STATISTICS_WORDS (1000) before comparing it with others."
                )
        if count := cfg.ENCODER.STATISTICS_WORDS:
            words = some_pixels(open_words(cfg, train=True), count, tuple(cfg.DATA.WORD_SIZE))
            gather_statistics(self.encoder, words)
            logger.info("Gathered the encoder's running statistics on %d words.", len(words))

    def train(self, mode: bool = True) -> "Recognizer":
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def prepare(self, batch: dict) -> Batch:
        """Upload words, make their views in training; strings stay as they are."""
        device = next(self.parameters()).device
        parts = {key: upload(batch[key], device) for key in ("image", "draws", "labels")
                 if key in batch}  # fmt: skip
        image = parts["image"]
        if "draws" in parts:
            image = augment(image, parts["draws"], None, self.radius)
        last = self.encoder.visual.channels_last
        layout = torch.channels_last if last else torch.contiguous_format
        told = {key: batch[key] for key in ("image_id", "label", "set", "position") if key in batch}
        return {**told, "image": normalize(image, None, layout), "labels": parts["labels"]}

    def frames(self, image: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) normalised -> (N, T, C)."""
        if not self.frozen:
            return self.encoder(image)
        with torch.no_grad():
            return self.encoder(image)

    def forward(self, batch: Batch) -> Batch:
        if self.frozen and self.training and not self._fingerprint:
            self._fingerprint = fingerprint(self.encoder)
        return {"loss_decoder": self.decoder.loss(self.frames(batch["image"]), batch["labels"])}

    def measure(self, batch: Batch) -> dict[str, tuple[torch.Tensor, int]]:
        frames = self.frames(batch["image"])
        read = self.decoder.read(frames)
        told = (
            batch["position"].tolist(),
            batch["set"].tolist(),
            batch["image_id"],
            batch["label"],
        )
        for place, number, image, label, reading in zip(*told, read, strict=True):
            row = Prediction(place, number, str(image), label, reading.text, reading.confidence)
            self._rows.append(row)
        loss = self.decoder.loss(frames, batch["labels"])
        return {"loss_decoder": (loss, self.count(batch))}

    def summarize(self, means: Mapping[str, float], val: ValSet) -> dict[str, float]:
        """Scores over all words, and of several sets those of each; writes them and what was read.

        Collective.
        """
        if self._fingerprint:
            require_untouched(self.encoder, self._fingerprint)
        mine, self._rows = self._rows, []
        rows = sorted(row for part in comm.all_gather(mine) for row in part)
        names = val.samples.set_names
        pairs = [(compared(row.label, self.cfg), compared(row.read, self.cfg)) for row in rows]
        found = {"": dataclasses.asdict(score_words(pairs))}
        for number, name in enumerate(names):
            of_set = [pair for row, pair in zip(rows, pairs) if row.set == number]
            if of_set and len(names) > 1:
                found[f"{name}/"] = dataclasses.asdict(score_words(of_set))
        if comm.is_main_process():
            self._write(rows, pairs, names, found)
        return {f"{name}{key}": v for name, scores in found.items() for key, v in scores.items()}

    def _write(
        self,
        rows: list["Prediction"],
        pairs: list[tuple[str, str]],
        names: Sequence[str],
        found: Mapping[str, dict],
    ) -> None:
        with (
            atomic_path(os.path.join(self.cfg.OUTPUT_DIR, PREDICTIONS)) as temporary,
            open(temporary, "w", encoding="utf-8", newline="") as file,
        ):
            writer = csv.writer(file, "excel-tab", lineterminator="\n")
            writer.writerow(COLUMNS)
            for row, (label, read) in zip(rows, pairs):
                cells = (names[row.set], row.image, row.label, row.read)
                writer.writerow([*cells, f"{row.confidence:.4f}", int(label == read)])
        with atomic_path(os.path.join(self.cfg.OUTPUT_DIR, SCORES)) as temporary:
            of = {name.rstrip("/") or "all": scores for name, scores in found.items()}
            temporary.write_text(json.dumps(of, indent=1, ensure_ascii=False) + "\n", "utf-8")

    @staticmethod
    def export(state: Batch, cfg: CfgNode) -> dict[str, Exported]:
        tuned = {} if cfg.ENCODER.FREEZE else SeqCLR.export(state, cfg)  # encoder and backbone
        return {"recognizer": export_recognizer(state, cfg), **tuned}


class Prediction(NamedTuple):
    """What was read in a word of a validation."""

    place: int
    set: int
    image: str
    label: str
    read: str
    confidence: float


class LabelledWords(Samples):
    """Words with their labels.

    `image` (3, H, W) uint8; `labels` (L,) int64, letters by `Alphabet`; in training `draws`
    (`augmentation.NUMBERS`,); in validation the text `label`, and `set`, its number.

    Attributes:
        set_names: of the validation, the shortest that tell the sets apart.
    """

    padding = {"labels": 0}

    def __init__(self, cfg: CfgNode, val: Sequence[CaptionRecord]):
        super().__init__(cfg)
        self.size = tuple(cfg.DATA.WORD_SIZE)
        self.case = cfg.DECODER.CASE
        self.alphabet = Alphabet(cfg.DECODER.ALPHABET)
        self.num_outputs = len(self.alphabet)
        self.draw = ViewDraws(cfg.DECODER)
        self._val = val
        self.set_names = _short_names(getattr(val, "names", ()))

    def train(self, visit: Visit) -> dict[str, torch.Tensor]:
        pixels = word_pixels(visit.image.whole(), self.size)
        return {
            "image": pixels,
            "labels": self._letters(visit.record.captions[0]),
            "draws": self.draw(visit.rng()),
        }

    def val(self, visit: Visit) -> list[dict]:
        label = visit.record.captions[0]
        return [
            {
                "image": word_pixels(visit.image, self.size),
                "labels": self._letters(label),
                "label": label,
                "set": torch.tensor(self._val.part_of(visit.index)),
            }
        ]

    def _letters(self, label: str) -> torch.Tensor:
        return self.alphabet.encode(with_case(label, self.case))

    def identity(self) -> dict[str, str]:
        return {"alphabet": self.alphabet.letters}


def _short_names(names: Sequence[str]) -> tuple[str, ...]:
    short = [os.path.basename(os.path.abspath(name)) for name in names]
    count = Counter(short)
    return tuple(name if count[s] > 1 else s for name, s in zip(names, short))


def _usable(cfg: CfgNode, train: bool, words: WordSet) -> WordSet:
    """The words of a set that a decoder can learn from, or be judged by; InputError where a set
    is of another kind."""
    words = labelled_words(words, cfg.DATA.MAX_SKIPPED_SHARE)
    return fitting_words(words, cfg, train)


def export_recognizer(state: Batch, cfg: CfgNode) -> Exported:
    """A recogniser's state dict whole, and all that is needed to build it and to feed it."""
    built = {
        "MODEL.VISUAL.NAME": cfg.MODEL.VISUAL.NAME,
        "DATA.WORD_SIZE": list(cfg.DATA.WORD_SIZE),
        **{f"ENCODER.{key}": cfg.ENCODER[key] for key in ("CONTEXT", "JOINED")},
        **{
            f"DECODER.{key}": cfg.DECODER[key]
            for key in ("NAME", "ALPHABET", "CASE", "CONTEXT", "HIDDEN_SIZE", "MAX_LENGTH")
        },
    }
    metadata = {
        "format": FORMAT,
        "format_version": VERSION,
        "config": json.dumps(built, ensure_ascii=False),
        **IMAGENET_RGB.metadata(),
    }
    return Exported({name: tensor.detach().cpu() for name, tensor in state.items()}, metadata)


def require_recognizer(path: str, cfg: CfgNode) -> None:
    """Refuse a checkpoint that is no recogniser, or one of other letters."""
    content = read_checkpoint(path)
    state = content.get("model", content)
    state = state if isinstance(state, dict) else {}
    letters = state.get(LETTERS)
    if not isinstance(letters, torch.Tensor):
        run = content.get("run")
        keys = run.get("keys") if isinstance(run, dict) else None
        source = keys.get("MODEL.OBJECTIVE") if isinstance(keys, dict) else None
        of = f" of MODEL.OBJECTIVE {source}" if source else ""
        raise InputError(
            f"{path}: expected a recognizer, as tools/train_recognizer.py writes it, found a "
            f"checkpoint{of} without a decoder of letters. To train a decoder on its encoder, give "
            "it as ENCODER.WEIGHTS."
        )
    found = "".join(map(chr, letters.int().tolist()))
    if found != cfg.DECODER.ALPHABET:
        raise InputError(
            f"{path}: reads the letters {found!r}, DECODER.ALPHABET is {cfg.DECODER.ALPHABET!r}. "
            "Give it those that it was trained with."
        )
