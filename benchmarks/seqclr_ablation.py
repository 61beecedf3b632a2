"""Which instances and which projection teach a reader most? The paper's table, on any words.

python benchmarks/seqclr_ablation.py --output output/ablation \\
    --words words/unlabelled --labelled words/train.txt --test words/test.txt

For each mapping, projection and seed a SeqCLR pretraining, then for each decoder a recogniser on
its frozen encoder, and on one of random weights (whose running statistics are those it begins
with): the counterpart of the ablation of SeqCLR (arXiv 2012.10873, section 4). Prints word accuracy
and character error rate, mean and standard deviation over seeds, and writes results.json. What is
done is not repeated, and what was stopped goes on. Keys of configs follow `--pretrain` and
`--reader` as KEY VALUE; for what both must have in common (ResNet, context, size) the former are
enough.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pretrain.config import load_pretrain_config  # noqa: E402
from virtex_d2.engine.errors import exit_on_input_error  # noqa: E402
from virtex_d2.engine.files import atomic_path, read_json  # noqa: E402
from virtex_d2.studies.stages import Stage, claim_output, exit_on_stop, run_stages  # noqa: E402

SCORES = {"accuracy": "word_accuracy", "CER": "cer"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for all of it")
    for name, about in (
        ("words", "to pretrain on"),
        ("labelled", "with labels, to train readers on"),
        ("test", "with labels, to judge them by"),
    ):
        parser.add_argument(f"--{name}", nargs="+", required=True, help=f"sets of words {about}")
    parser.add_argument("--mappings", nargs="+", default=["all", "frame", "window"])
    parser.add_argument("--projections", nargs="+", default=["none", "mlp", "bilstm"])
    parser.add_argument("--decoders", nargs="+", default=["ctc", "attention"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=1, help="processes at the same time")
    parser.add_argument("--config", default="configs/pretrain/seqclr_small_R_18.yaml")
    parser.add_argument("--reader-config", default="configs/recognition/scene_ctc_R_50.yaml")
    parser.add_argument("--pretrain", nargs="*", default=[], metavar="KEY VALUE")
    parser.add_argument("--reader", nargs="*", default=[], metavar="KEY VALUE")
    args = parser.parse_args()
    args.output = args.output.resolve()

    claim_output(args.output, "ablation", {"config": args.config, "reader": args.reader_config})
    pretraining, readers = stages(args)
    run_stages([*pretraining, *readers], ROOT, args.output, [{}] * args.jobs)
    report(args)


def stages(args: argparse.Namespace) -> tuple[list[Stage], list[Stage]]:
    """All pretrainings, and all readers on them and on random encoders."""
    words, labelled, test = (
        repr([str(Path(path).resolve()) for path in given])
        for given in (args.words, args.labelled, args.test)
    )
    cfg = load_pretrain_config(str(ROOT / args.config), args.pretrain)
    context = cfg.ENCODER.CONTEXT
    shared = ["MODEL.VISUAL.NAME", cfg.MODEL.VISUAL.NAME, "ENCODER.CONTEXT", context]
    shared += ["DATA.WORD_SIZE", str(tuple(cfg.DATA.WORD_SIZE))]
    shared += ["ENCODER.JOINED", str(context != "none")]
    pretraining, readers = [], []
    for seed in args.seeds:
        encoders: dict[str, Stage | None] = {"random": None}
        for mapping, projection in product(args.mappings, args.projections):
            name = f"{mapping}-{projection}"
            opts = ["SEQCLR.MAPPING", mapping, "SEQCLR.PROJECTION", projection]
            opts += ["DATA.WORDS", words, *args.pretrain]
            encoders[name] = stage(args, "pretrain_net", args.config, f"seed{seed}-{name}", opts)
            pretraining.append(encoders[name])
        for (name, encoder), decoder in product(encoders.items(), args.decoders):
            opts = ["DECODER.NAME", decoder, *shared, *args.reader]
            opts += ["DATA.WORDS", labelled, "DATA.VAL_WORDS", test]
            if encoder:
                opts += ["ENCODER.WEIGHTS", f"{encoder.folder}/encoder.safetensors"]
            needs = (encoder,) if encoder else ()
            title = f"seed{seed}-{name}-{decoder}"
            readers.append(stage(args, "train_recognizer", args.reader_config, title, opts, needs))
    return pretraining, readers


def stage(
    args: argparse.Namespace,
    tool: str,
    config: str,
    name: str,
    opts: Sequence[str],
    needs: tuple[Stage, ...] = (),
) -> Stage:
    folder, seed = str(args.output / name), name.split("-")[0].removeprefix("seed")
    command = (f"tools/{tool}.py", "--config-file", config, "SEED", seed, "OUTPUT_DIR", folder)
    title = f"{tool}: {name}"
    return Stage(name, title, (*command, *opts), folder, (config,), needs, group=tool)


def report(args: argparse.Namespace) -> None:
    """Print the table and write results.json."""
    names = ["random", *(f"{m}-{p}" for m, p in product(args.mappings, args.projections))]
    table = {
        name: {
            decoder: [
                read_json(args.output / f"seed{seed}-{name}-{decoder}" / "scores.json")["all"]
                for seed in args.seeds
            ]
            for decoder in args.decoders
        }
        for name in names
    }
    with atomic_path(args.output / "results.json") as temporary:
        temporary.write_text(json.dumps({"seeds": args.seeds, "scores": table}, indent=1) + "\n")
    columns = list(product(args.decoders, SCORES))
    print("| encoder | " + " | ".join(f"{decoder}, {score}" for decoder, score in columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name in names:
        cells = []
        for decoder, score in columns:
            values = [found[SCORES[score]] for found in table[name][decoder]]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    with exit_on_input_error(), exit_on_stop():
        main()
