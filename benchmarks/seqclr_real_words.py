"""Does it help to read real words? Frozen ResNet-18s on IIIT5K, with few labels and with many.

python benchmarks/seqclr_real_words.py --iiit5k FOLDER --captions backbone.safetensors \\
    --output output/real_words

FOLDER has train.txt and test.txt: path, tab, word, 2 000 each. Four starts for each seed: random;
SeqCLR on the training words, whose labels it does not see, and 6 000 rendered ones; a ResNet-18
that learnt from captions (one for all seeds); and SeqCLR that begins from that. Each is frozen, its
running statistics gathered anew on the same training words, its frames computed once; a BiLSTM and
CTC learn from 5, 10 and 100 % of the training labels (nested), without augmentation, and read the
test words in lower case. Words that no training label has are counted apart. What is done is not
repeated, and a pretraining that was stopped goes on. Some fifty minutes of one core.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measuring import machine  # noqa: E402
from benchmarks.seqclr_words import Reader, frames_of, load  # noqa: E402
from pretrain.config import load_pretrain_config  # noqa: E402
from pretrain.methods.seqclr.encoder import Encoder, gather_statistics  # noqa: E402
from pretrain.methods.seqclr.rendered import LIST, write_words  # noqa: E402
from pretrain.methods.seqclr.scores import score_words  # noqa: E402
from pretrain.trainer import PretrainTrainer  # noqa: E402
from virtex_d2.engine.errors import exit_on_input_error  # noqa: E402
from virtex_d2.engine.files import atomic_path, read_json  # noqa: E402
from virtex_d2.studies.stages import claim_output  # noqa: E402
from virtex_d2.studies.verdict import difference, sample  # noqa: E402

CONFIG = ROOT / "configs/pretrain/seqclr_small_R_18.yaml"
RENDERED = 6000
LETTERS = "0123456789abcdefghijklmnopqrstuvwxyz"
HIDDEN = 128  # of the reader's BiLSTM
STEPS = 600  # of the reader, with however many labels
SHARES = (0.05, 0.1, 1.0)
# A start: whether it begins from captions, and whether SeqCLR follows.
STARTS = {
    "random": (False, False),
    "SeqCLR": (False, True),
    "captions": (True, False),
    "captions, SeqCLR": (True, True),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--iiit5k", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--captions", type=Path, required=True, metavar="BACKBONE")
    parser.add_argument("--output", type=Path, required=True, help="folder for all of it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--iterations", type=int, default=200, help="of SeqCLR, 64 words each")
    parser.add_argument("--results", type=Path, help="file for the figures, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    given = {"iterations": args.iterations, "steps": STEPS, "captions": str(args.captions)}
    claim_output(args.output, "seqclr_real_words", given)
    args.output = args.output.resolve()
    if not (args.output / "rendered" / LIST).exists():
        write_words(args.output / "rendered", RENDERED, 1, True, LETTERS, (2, 10))
    words = {split: load(args.iiit5k / f"{split}.txt") for split in ("train", "test")}
    words = {
        split: (pixels, [t.lower() for t in texts]) for split, (pixels, texts) in words.items()
    }
    found = {}
    for seed in args.seeds:
        for start in STARTS:
            kept = args.output / f"{start.replace(', ', '_')}_{seed}.json"
            if not kept.exists():
                encoder = started(args, start, seed)
                gather_statistics(encoder, words["train"][0][::2])
                with atomic_path(kept) as temporary:
                    temporary.write_text(json.dumps(read_shares(encoder, words, seed)))
            found.setdefault(start, {})[seed] = read_json(kept)
            print(start, seed, found[start][seed], flush=True)
    report(found, args)


def started(args: argparse.Namespace, start: str, seed: int) -> Encoder:
    """The encoder of a start, pretrained unless that is done."""
    captions, contrast = STARTS[start]
    folder = args.output / f"{start.replace(', ', '_')}_{seed}"
    folder.mkdir(exist_ok=True)
    sets = [str(args.output / "rendered" / LIST), str(args.iiit5k.resolve() / "train.txt")]
    options = {
        "MODEL.DEVICE": "cpu",
        "MODEL.WEIGHTS": args.captions.resolve() if captions else "",
        "DATA.WORDS": sets,
        "SOLVER.MAX_ITER": args.iterations,
        "SOLVER.WARMUP_ITERS": args.iterations // 10,
        "TEST.EVAL_PERIOD": 0,
        "SEED": seed,
        "OUTPUT_DIR": folder,
    }
    opts = [str(part) for pair in options.items() for part in pair]
    trainer = PretrainTrainer(load_pretrain_config(str(CONFIG), opts))
    trainer.resume_or_load(resume=contrast)
    if contrast:
        trainer.train()
    return trainer.method.encoder


def read_shares(encoder: Encoder, words: dict, seed: int) -> dict[str, dict]:
    """Scores on all test words and on unseen ones, by the share of labels that a reader had."""
    frames = {split: frames_of(encoder, pixels) for split, (pixels, _) in words.items()}
    (_, labels), (_, truth) = words["train"], words["test"]
    order = np.random.default_rng(seed).permutation(len(labels))
    seen, found = set(labels), {}
    for share in SHARES:
        taken = order[: round(share * len(labels))]
        torch.manual_seed(seed)
        reader = Reader(encoder.out_features, LETTERS, HIDDEN)
        reader.fit(frames["train"][taken], [labels[i] for i in taken], STEPS, seed, rate=2e-3)
        pairs = list(zip(truth, reader.read(frames["test"])))
        new = [pair for pair in pairs if pair[0] not in seen]
        found[f"{share:.0%}"] = {"all": asdict(score_words(pairs)), "new": asdict(score_words(new))}
    return found


def report(found: dict[str, dict[int, dict]], args: argparse.Namespace) -> None:
    """Print means and differences from random with intervals, and write all figures."""
    for share in (f"{share:.0%}" for share in SHARES):
        for which in ("all", "new"):
            print(f"{share} of the labels, {which} test words: CER, word accuracy, CER - random's")
            cer = {start: of_seeds(seeds, share, which, "cer") for start, seeds in found.items()}
            for start, seeds in found.items():
                accuracy = sample(of_seeds(seeds, share, which, "word_accuracy")).mean
                less = difference(cer[start], cer["random"])
                low, high = less.interval or (float("nan"),) * 2
                print(
                    f"  {start:17} {sample(cer[start]).mean:.3f}  {accuracy:.3f}  "
                    f"{less.mean:+.3f} [{low:+.3f}, {high:+.3f}]"
                )
    options = {"iterations": args.iterations, "steps": STEPS, "rendered": RENDERED}
    result = {"machine": machine(torch.device("cpu")), **options, "scores": found}
    for path in filter(None, (args.output / "results.json", args.results)):
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")


def of_seeds(seeds: dict[int, dict], share: str, which: str, score: str) -> dict[int, float]:
    return {seed: scores[share][which][score] for seed, scores in seeds.items()}


if __name__ == "__main__":
    with exit_on_input_error():
        main()
