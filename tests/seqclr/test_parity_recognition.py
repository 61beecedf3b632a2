"""The numbers that deep-text-recognition-benchmark computed, from our contexts and decoders.

Every `str_*.json` of every folder in $METHOD_PARITY_CASES (separated by ":"; default
`../shared/parity_methods`) is computed again. The benchmark's own ResNet is rebuilt here: the
product has torchvision's.
"""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from pretrain.methods.seqclr.decoders import Alphabet, AttentionDecoder, CTCDecoder
from pretrain.methods.seqclr.encoder import BiLSTM

SHARED = Path(__file__).resolve().parents[3] / "shared" / "parity_methods"
FOLDERS = os.environ.get("METHOD_PARITY_CASES", str(SHARED)).split(":")
FILES = [path for folder in FOLDERS for path in sorted(Path(folder).glob("str_*.json"))]
KNOWN = {"Transformation": ["None"], "FeatureExtraction": ["ResNet"]}
KNOWN |= {"SequenceModeling": ["None", "BiLSTM"], "Prediction": ["CTC", "Attn"]}


def test_cases_are_there():
    if not FILES and os.environ.get("REQUIRE_REAL_DATA") != "1":
        pytest.skip(f"no str_*.json in {FOLDERS}; set METHOD_PARITY_CASES to run this test")
    assert FILES, f"no str_*.json in {FOLDERS}"


class Block(nn.Module):
    def __init__(self, before, after):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.downsample = nn.Sequential()
        if before != after:
            self.downsample = nn.Sequential(
                nn.Conv2d(before, after, 1, bias=False), nn.BatchNorm2d(after)
            )

    def forward(self, x):
        inner = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (inner + self.downsample(x)).relu()


class BenchmarkResNet(nn.Module):
    """32 x W -> 1 x (W / 4 + 1), of four stages."""

    # convolution, norm, (kernel, stride, padding)
    LAST = (("conv4_1", "bn4_1", (2, (2, 1), (0, 1))), ("conv4_2", "bn4_2", (2, 1, 0)))

    def __init__(self, colours, size):
        super().__init__()
        self.stages = []
        before = self._convolve("conv0_1", "bn0_1", colours, size // 16)
        before = self._convolve("conv0_2", "bn0_2", before, size // 8)
        pools = [nn.MaxPool2d(2), nn.MaxPool2d(2), nn.MaxPool2d(2, (2, 1), (0, 1)), nn.Identity()]
        for stage, blocks in enumerate((1, 2, 5, 3), 1):
            width = min(size, size // 8 * 2**stage)
            self.stages.append(pools[stage - 1])
            layer = [Block(before if n == 0 else width, width) for n in range(blocks)]
            setattr(self, f"layer{stage}", nn.Sequential(*layer))
            self.stages.append(getattr(self, f"layer{stage}"))
            before = width
            if stage < 4:
                self._convolve(f"conv{stage}", f"bn{stage}", width, width)
        for conv, norm, shape in self.LAST:
            self._convolve(conv, norm, size, size, *shape)

    def _convolve(self, conv, norm, before, after, kernel=3, stride=1, padding=1):
        setattr(self, conv, nn.Conv2d(before, after, kernel, stride, padding, bias=False))
        setattr(self, norm, nn.BatchNorm2d(after))
        self.stages += [getattr(self, conv), getattr(self, norm), nn.ReLU()]
        return after

    def forward(self, x):
        for stage in self.stages:
            x = stage(x)
        return x


def agrees(found, expected):
    assert list(found.shape) == expected["shape"]
    norm = float(found.double().norm())
    assert norm == pytest.approx(expected["norm"], rel=1e-5)
    head = torch.tensor(expected["head"])
    torch.testing.assert_close(found.flatten()[: len(head)], head, rtol=1e-5, atol=1e-5)


@pytest.mark.slow  # 40 million weights are drawn
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_contexts_and_decoders_give_the_benchmarks_numbers(path):
    case = json.loads(path.read_text())
    arguments = case["arguments"]
    for key, values in KNOWN.items():
        assert arguments[key] in values, f"{path}: this test knows {key} {values} alone"
    spec = importlib.util.spec_from_file_location("parity_weights", path.parent / "weights.py")
    weights = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(weights)
    state = weights.state_dict(
        case["shapes"], case["seed"], case.get("fixed"), case.get("linear", 0.05)
    )
    state = {name: torch.from_numpy(value) for name, value in state.items()}

    size, hidden = arguments["output_channel"], arguments["hidden_size"]
    resnet = BenchmarkResNet(arguments["input_channel"], size).eval()
    load(resnet, state, "FeatureExtraction.ConvNet.")
    decoder = build(arguments)
    load(decoder.context, state, "SequenceModeling.")
    names = {"weight": "output.weight", "bias": "output.bias"}
    renamed = {names.get(name, name): value for name, value in below(state, "Prediction.").items()}
    rest = decoder.load_state_dict(renamed, strict=False)
    assert not rest.unexpected_keys
    assert {name.partition(".")[0] for name in rest.missing_keys} <= {"letters", "context"}
    parts = ("FeatureExtraction.", "SequenceModeling.", "Prediction.")
    assert all(name.startswith(parts) for name in state), "a part that this test does not know"

    shape = [2, arguments["input_channel"], arguments["imgH"], arguments["imgW"]]
    image = torch.from_numpy(weights.pixels(shape, case["seed"])) / 127.5 - 1
    with torch.no_grad():
        found = {"map": resnet(image)}
        found["visual_frames"] = found["map"].mean(dim=2).transpose(1, 2)
        found["contextual_frames"] = decoder.context(found["visual_frames"])
        found["prediction"] = decoder.predict(found["visual_frames"])
    assert hidden == found["contextual_frames"].shape[2] or arguments["SequenceModeling"] == "None"
    assert case["expected"].keys() <= found.keys()
    for name, expected in case["expected"].items():
        agrees(found[name], expected)


def build(arguments):
    size, hidden = arguments["output_channel"], arguments["hidden_size"]
    has_context = arguments["SequenceModeling"] == "BiLSTM"
    ours = has_context and hidden == 256
    in_features = hidden if has_context and not ours else size
    context = "bilstm" if ours else "none"
    classes = arguments["num_class"] - (1 if arguments["Prediction"] == "CTC" else 2)
    alphabet = Alphabet("".join(map(chr, range(ord("a"), ord("a") + classes))))
    if arguments["Prediction"] == "CTC":
        decoder = CTCDecoder(in_features, alphabet, context)
    else:
        length = arguments["batch_max_length"]
        decoder = AttentionDecoder(in_features, alphabet, context, hidden, length)
    if has_context and not ours:  # another size than the product's
        decoder.context.append(BiLSTM(size, hidden, hidden))
        decoder.context.append(BiLSTM(hidden, hidden, hidden))
    return decoder.eval()


def below(state, prefix):
    return {n.removeprefix(prefix): value for n, value in state.items() if n.startswith(prefix)}


def load(module, state, prefix):
    module.load_state_dict(below(state, prefix))
