"""Does SeqCLR learn letters? Frozen encoders on rendered words, with the controls that must fail.

python benchmarks/seqclr_words.py --output output/seqclr_words

A thin ResNet is pretrained on rendered words without their labels; then, frozen and with running
statistics recomputed on the same words (for a random network as well, which would be handicapped
otherwise), a BiLSTM and CTC learn to read from its frames. In the plain world, all dark on light:
random weights, windows, and windows whose views are of two different words (`rolled`). In the style
world, of any colours, contrasts and gradients: random weights, windows without STYLE, and with it.
Each cell is done once: a stopped call goes on. Some six minutes of one core.
"""

import argparse
import json
import statistics
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn.utils.rnn import pad_sequence

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from torchvision.models.resnet import BasicBlock  # noqa: E402

import virtex_d2  # noqa: E402, F401 - before detectron2
from pretrain.backbone import VisualBackbone  # noqa: E402
from pretrain.config import load_pretrain_config  # noqa: E402
from pretrain.methods.seqclr.decoders import PAD, Alphabet, CTCDecoder  # noqa: E402
from pretrain.methods.seqclr.encoder import BiLSTM, Encoder, frozen_frames, gather_statistics  # noqa: E402
from pretrain.methods.seqclr.loss import nt_xent  # noqa: E402
from pretrain.methods.seqclr.method import SeqCLR  # noqa: E402
from pretrain.methods.seqclr.rendered import LETTERS, LIST, write_words  # noqa: E402
from pretrain.methods.seqclr.scores import score_words  # noqa: E402
from pretrain.methods.seqclr.words import read_words  # noqa: E402
from pretrain.trainer import PretrainTrainer  # noqa: E402
from virtex_d2.engine.files import atomic_path, read_json  # noqa: E402
from virtex_d2.engine.images import read_image  # noqa: E402
from virtex_d2.studies.stages import claim_output  # noqa: E402

WIDTH = 12  # of the first stage; the last has eight times as many channels
# Words of a split, and the seed that they are drawn by.
SPLITS = {"pretrain": (3000, 1), "train": (800, 2), "test": (400, 3)}
EPOCHS = 25  # that the reader trains
HIDDEN = 64  # of the reader's BiLSTM
# What a cell pretrains with; None: nothing. In the order in which they are told apart.
CELLS = {
    "plain": {"random": None, "window": (), "rolled": ()},
    "style": {"random": None, "window": (), "window, STYLE": ("SEQCLR.STYLE", True)},
}
OPTS = """MODEL.DEVICE cpu MODEL.VISUAL.NAME resnet18 SEQCLR.STYLE False DATA.NUM_WORKERS 0
SOLVER.OPTIMIZER adamw SOLVER.CNN_LR 0.002 SOLVER.BASE_LR 0.002 SOLVER.WEIGHT_DECAY 0.01
SOLVER.NO_DECAY .*(bn.*|bias.*) SOLVER.IMS_PER_BATCH 64 SOLVER.WARMUP_ITERS 10
SOLVER.CHECKPOINT_PERIOD 50 SOLVER.CHECKPOINT_KEEP_LAST 2 SOLVER.LOOKAHEAD.ENABLED False
SOLVER.AMP.ENABLED False"""


def thin_visual() -> VisualBackbone:
    """A ResNet-18 of an eighth of the usual channels and a bit more."""
    visual = VisualBackbone("resnet18")
    cnn = visual.cnn
    cnn.inplanes = WIDTH
    cnn.conv1 = nn.Conv2d(3, WIDTH, 7, 2, 3, bias=False)
    cnn.bn1 = nn.BatchNorm2d(WIDTH)
    for stage in range(4):
        layer = cnn._make_layer(BasicBlock, WIDTH << stage, 2, stride=2 if stage else 1)
        setattr(cnn, f"layer{stage + 1}", layer)
    for module in cnn.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    visual.feature_size = WIDTH << 3
    return visual


class Thin(SeqCLR):
    """SeqCLR with a thin encoder."""

    def __init__(self, cfg, num_outputs):
        super().__init__(cfg, num_outputs)
        self.encoder = Encoder(thin_visual())

    @staticmethod
    def export(state, cfg):
        return {}  # no detector has such a ResNet


class Rolled(Thin):
    """The control: an instance's pair is of another word."""

    def compare(self, batch):
        one, other = self.instances(batch["image"]).chunk(2)
        return nt_xent(one, other.roll(1, 0), self.own.TEMPERATURE)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for all of it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--worlds", nargs="+", choices=list(CELLS), default=list(CELLS))
    parser.add_argument("--iterations", type=int, default=40)
    args = parser.parse_args()
    torch.set_num_threads(1)
    claim_output(args.output, "seqclr_words", {"iterations": args.iterations, "epochs": EPOCHS})
    found = {}
    for world in args.worlds:
        folder = args.output.resolve() / world
        for split, of_split in SPLITS.items():
            if not (folder / split / LIST).exists():
                write_words(folder / split, *of_split, style=world == "style")
        for seed in args.seeds:
            for start, opts in CELLS[world].items():
                name = f"{start.replace(', ', '_')}_{seed}"
                kept = folder / f"{name}.json"
                if not kept.exists():
                    encoder = pretrained(folder, name, seed, start, opts, args.iterations)
                    with atomic_path(kept) as temporary:
                        temporary.write_text(json.dumps(read_frozen(encoder, folder, seed)))
                cell = read_json(kept)
                found.setdefault(world, {}).setdefault(start, []).append(cell)
                print(f"{world}: {start}, seed {seed}: CER {cell['cer']:.3f}", flush=True)
    report(found, args)


def pretrained(
    folder: Path, name: str, seed: int, start: str, opts: tuple | None, iterations: int
) -> Encoder:
    """The encoder of a cell, running statistics recomputed."""
    kind = "Rolled" if start == "rolled" else "Thin"
    cfg = load_pretrain_config(
        None,
        [
            *("MODEL.OBJECTIVE", f"benchmarks.seqclr_words:{kind}", *OPTS.split()),
            *("DATA.WORDS", str([str(folder / "pretrain" / LIST)]), "SEED", str(seed)),
            *("SOLVER.MAX_ITER", str(iterations), "OUTPUT_DIR", str(folder / name)),
            *map(str, opts or ()),
        ],
    )
    Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
    trainer = PretrainTrainer(cfg)
    if opts is not None:
        trainer.resume_or_load(resume=True)
        trainer.train()
    encoder = trainer.method.encoder
    gather_statistics(encoder, load(folder / "pretrain" / LIST)[0][:1000])
    return encoder.eval()


def load(words: Path) -> tuple[torch.Tensor, list[str]]:
    """(N, 3, H, W) uint8 words of a list, and their labels."""
    records = read_words(words)[0].records
    pixels = [
        np.array(read_image(record.image_file()).resize((100, 32), Image.Resampling.BICUBIC))
        for record in records
    ]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), [r.captions[0] for r in records]


def read_frozen(encoder: Encoder, folder: Path, seed: int, epochs: int = EPOCHS) -> dict:
    """Train a reader on frozen frames, and read the test words."""
    frames, labels = {}, {}
    for split in ("train", "test"):
        pixels, labels[split] = load(folder / split / LIST)
        frames[split] = frames_of(encoder, pixels)
    torch.manual_seed(seed)
    reader = Reader(encoder.out_features, LETTERS, HIDDEN)
    steps = epochs * len(labels["train"]) // 32
    reader.fit(frames["train"], labels["train"], steps, seed)
    return asdict(score_words(zip(labels["test"], reader.read(frames["test"]))))


def frames_of(encoder: Encoder, pixels: torch.Tensor) -> torch.Tensor:
    """(N, T, C) frames, computed once."""
    return torch.cat([frozen_frames(encoder, part) for part in pixels.split(100)])


class Reader(nn.Module):
    """A BiLSTM and CTC on frames."""

    def __init__(self, in_features: int, letters: str, hidden: int):
        super().__init__()
        self.context = BiLSTM(in_features, hidden, hidden)
        self.decoder = CTCDecoder(hidden, Alphabet(letters))

    def fit(
        self, frames: torch.Tensor, labels: list[str], steps: int, seed: int, rate: float = 5e-3
    ) -> "Reader":
        """Train with AdamW on batches of 32, the rate along half a cosine."""
        parameters = list(self.parameters())
        optimizer = torch.optim.AdamW(parameters, rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        targets = [self.decoder.alphabet.encode(text) for text in labels]
        targets = pad_sequence(targets, True, PAD)
        rng = np.random.default_rng(seed)
        for _ in range(steps):
            batch = rng.choice(len(targets), 32, replace=False)
            loss = self.decoder.loss(self.context(frames[batch]), targets[batch])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 5.0)
            optimizer.step()
            schedule.step()
        return self

    @torch.no_grad()
    def read(self, frames: torch.Tensor) -> list[str]:
        return [reading.text for reading in self.decoder.read(self.context(frames))]


def report(found: dict, args: argparse.Namespace) -> None:
    """Print the table and write results.json."""
    table = {
        world: {
            start: {
                "cer": [cell["cer"] for cell in cells],
                "mean": statistics.mean(cell["cer"] for cell in cells),
            }
            for start, cells in of_world.items()
        }
        for world, of_world in found.items()
    }
    result = {"seeds": args.seeds, "iterations": args.iterations, "cer": table}
    path = args.output / "results.json"
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
