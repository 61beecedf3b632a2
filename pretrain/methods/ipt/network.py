"""The image processing transformer: a head and a tail for each task, and one body for all.

IPT (arXiv 2012.00364, section 3.1). Names and shapes in the state dict are those of the released
checkpoints (huawei-noah/Pretrained-IPT), which therefore load as they are.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from pretrain.export import differences
from virtex_d2.engine.errors import InputError

# DIV2K's, RGB, as shares of 255: what the released networks subtract.
MEAN = (0.4488, 0.4371, 0.4040)
TOKEN = 3  # side of the square of features that is a token
POSITIONS = ("once", "every", "none")


@dataclass(frozen=True)
class Sizes:
    """What a network is made of; the defaults are the released x2 network's.

    Attributes:
        scales: of each task, how many times larger its output is: 1, 2, 3, 4 or 8.
        features: channels of the maps between head, body and tail; a token has nine times as many.
        patch: side of the input in pixels, a multiple of 3.
        layers: of the encoder, and again of the decoder.
        heads: of attention; no checkpoint's shapes tell them.
        positions: where the learned positions are added: "once" before the encoder, in "every"
            layer's queries and keys, or "none". "once" and "every" have the same shapes.
        mlp: whether tokens are embedded by a linear layer, know their task, and end in an MLP.
    """

    scales: tuple[int, ...] = (2,)
    features: int = 64
    patch: int = 48
    layers: int = 12
    heads: int = 12
    positions: str = "once"
    mlp: bool = True

    def __post_init__(self):
        wrong = []
        if self.patch < TOKEN or self.patch % TOKEN:
            wrong.append(f"a patch of {self.patch} pixels is no multiple of {TOKEN}")
        if min(self.features, self.layers, self.heads) < 1:
            wrong.append("features, layers and heads must be 1 or more")
        elif self.width % self.heads:
            wrong.append(f"{self.width} channels of a token do not divide into {self.heads} heads")
        if not self.scales or any(scale not in (1, 2, 3, 4, 8) for scale in self.scales):
            wrong.append(f"scales {list(self.scales)} are not all of 1, 2, 3, 4, 8")
        if self.positions not in POSITIONS:
            wrong.append(f"positions {self.positions!r} are none of {', '.join(POSITIONS)}")
        if wrong:
            raise InputError(f"An IPT of such sizes cannot be: {'; '.join(wrong)}.")

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.features * TOKEN**2

    @property
    def tokens(self) -> int:
        """Tokens of a patch."""
        return (self.patch // TOKEN) ** 2


class IPT(nn.Module):
    """Restores patches of a side of `sizes.patch` pixels.

    Pixels are RGB on the scale 0-255; the output is neither clipped nor rounded.
    """

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.sizes = sizes
        features = sizes.features
        self.sub_mean = MeanShift(-1)
        self.head = nn.ModuleList(
            nn.Sequential(_conv(3, features), ResidualBlock(features), ResidualBlock(features))
            for _ in sizes.scales
        )
        self.body = Body(sizes)
        self.tail = nn.ModuleList(
            nn.Sequential(_enlarge(scale, features), _conv(features, 3)) for scale in sizes.scales
        )
        self.add_mean = MeanShift(1)

    def forward(self, x: torch.Tensor, task: int) -> torch.Tensor:
        """(N, 3, P, P) -> (N, 3, kP, kP) of the task with this number, whose scale is k."""
        return self.restore(x, task)[0]

    def restore(self, x: torch.Tensor, task: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`forward`, and the tokens (N, tokens, width) that the contrastive loss compares.

        Raises:
            ValueError: the images are of other sides than the network's patch.
        """
        patch = self.sizes.patch
        if x.shape[1:] != (3, patch, patch):
            raise ValueError(f"expected (N, 3, {patch}, {patch}), found {tuple(x.shape)}")
        seen = self.head[task](self.sub_mean(x))  # (N, F, P, P)
        mended, tokens = self.body(seen, task)
        return self.add_mean(self.tail[task](mended + seen)), tokens


class MeanShift(nn.Module):
    """Subtract (-1) or add (1) the mean colour; checkpoints hold it as a convolution."""

    def __init__(self, sign: int):
        super().__init__()
        self.register_buffer("weight", torch.eye(3).view(3, 3, 1, 1))
        self.register_buffer("bias", sign * 255 * torch.tensor(MEAN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # bfloat16 would round pixels to even numbers
        with torch.autocast(x.device.type, enabled=False):
            return F.conv2d(x.to(self.weight.dtype), self.weight, self.bias)


class ResidualBlock(nn.Module):
    """Two 5x5 convolutions, not normalised, beside the identity."""

    def __init__(self, features: int):
        super().__init__()
        first, second = _conv(features, features, 5), _conv(features, features, 5)
        self.body = nn.Sequential(first, nn.ReLU(), second)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


class Body(nn.Module):
    """The transformer on squares of 3x3 features, in the order of `F.unfold`."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.sizes = sizes
        width, hidden = sizes.width, 4 * sizes.width
        if sizes.mlp:
            self.linear_encoding = nn.Linear(width, width)
            # numbered as with the dropouts that checkpoints are named after
            self.mlp_head = nn.Sequential(
                nn.Linear(width, hidden), nn.Identity(), nn.ReLU(), nn.Linear(hidden, width)
            )
            self.query_embed = nn.Embedding(len(sizes.scales), sizes.tokens * width)
        self.encoder, self.decoder = nn.Module(), nn.Module()
        layers = range(sizes.layers)
        self.encoder.layers = nn.ModuleList(EncoderLayer(width, sizes.heads) for _ in layers)
        self.decoder.layers = nn.ModuleList(DecoderLayer(width, sizes.heads) for _ in layers)
        if sizes.positions != "none":
            self.position_encoding = Positions(sizes.tokens, width)

    def forward(self, x: torch.Tensor, task: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, F, P, P) -> the same of the mended features, and their tokens (N, tokens, width)."""
        sizes, wanted = self.sizes, None
        z = F.unfold(x, TOKEN, stride=TOKEN).transpose(1, 2)  # (N, T, D)
        if sizes.mlp:
            z = z + self.linear_encoding(z)
            wanted = self.query_embed.weight[task].view(-1, sizes.width)  # (T, D)
        where = None if sizes.positions == "none" else self.position_encoding.pe.weight  # (T, D)
        if sizes.positions == "once":
            z, where = z + where, None
        for layer in self.encoder.layers:
            z = layer(z, where)
        memory = z  # is what the decoder begins with, too
        for layer in self.decoder.layers:
            z = layer(z, memory, where, wanted)
        if sizes.mlp:
            z = z + self.mlp_head(z)
        folded = F.fold(z.transpose(1, 2), (sizes.patch,) * 2, TOKEN, stride=TOKEN)
        return folded, z


class Positions(nn.Module):
    """A learned vector for each token of a patch."""

    def __init__(self, tokens: int, width: int):
        super().__init__()
        self.pe = nn.Embedding(tokens, width)
        self.register_buffer("position_ids", torch.arange(tokens).view(1, -1))


class EncoderLayer(nn.Module):
    """Attention among the tokens and a feed-forward part, each normalised first."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.self_attn = _attention(width, heads)
        # as released; attention in the decoder starts as torch has it
        nn.init.kaiming_uniform_(self.self_attn.in_proj_weight, a=math.sqrt(5))
        self.linear1, self.linear2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, z: torch.Tensor, where: torch.Tensor | None) -> torch.Tensor:
        """(N, T, D), and (T, D) added to queries and keys -> (N, T, D)."""
        value = self.norm1(z)
        query = _plus(value, where)
        z = z + _attend(self.self_attn, query, query, value)
        return z + self.linear2(self.linear1(self.norm2(z)).relu())


class DecoderLayer(nn.Module):
    """Attention among the tokens, to the encoder's, and a feed-forward part, normalised first."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.self_attn = _attention(width, heads)
        self.multihead_attn = _attention(width, heads)
        self.linear1, self.linear2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)

    def forward(
        self,
        z: torch.Tensor,
        memory: torch.Tensor,
        where: torch.Tensor | None,
        wanted: torch.Tensor | None,
    ) -> torch.Tensor:
        """Take (N, T, D) one layer further.

        Args:
            z, memory: tokens of the decoder and of the encoder.
            where: (T, D) added to the memory's keys.
            wanted: (T, D) embedding of the task, added to the decoder's queries and keys.
        """
        value = self.norm1(z)
        query = _plus(value, wanted)
        z = z + _attend(self.self_attn, query, query, value)
        query = _plus(self.norm2(z), wanted)
        z = z + _attend(self.multihead_attn, query, _plus(memory, where), memory)
        return z + self.linear2(self.linear1(self.norm3(z)).relu())


def _attention(width: int, heads: int) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(width, heads, bias=False, batch_first=True)


def _attend(attention: nn.MultiheadAttention, query, key, value) -> torch.Tensor:
    # without weights torch computes scaled_dot_product_attention
    return attention(query, key, value, need_weights=False)[0]


def _plus(x: torch.Tensor, more: torch.Tensor | None) -> torch.Tensor:
    return x if more is None else x + more


def _conv(inputs: int, outputs: int, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)


def _enlarge(scale: int, features: int) -> nn.Sequential:
    """Sub-pixel convolutions, x4 and x8 in steps of x2."""
    steps = [3] if scale == 3 else [2] * (scale.bit_length() - 1)
    parts = [(_conv(features, features * k**2), nn.PixelShuffle(k)) for k in steps]
    return nn.Sequential(*(part for pair in parts for part in pair))


# --- from a checkpoint's tensors


def sizes_of(
    state: Mapping[str, torch.Tensor], path: str, heads: int = 12, positions: str = "once"
) -> Sizes:
    """The sizes of the network whose state dict this is, from names and shapes.

    Args:
        state: by released names.
        path: of the file, for messages.
        heads: which no shape tells; the released networks have 12.
        positions: "once" or "every", which have the same shapes; not used where there are none.
    """

    def shape(name: str, dims: int) -> torch.Size:
        found = getattr(state.get(name), "shape", None)
        if found is None or len(found) != dims:
            what = "is missing" if found is None else f"has shape {tuple(found)}"
            raise InputError(
                f"{path}: is no checkpoint of IPT: {name} {what}, where {dims} dimensions are "
                "expected. Give a released IPT_*.pt or a restorer.safetensors of this project."
            )
        return found

    def numbers(pattern: str) -> int:
        """How many different numbers stand in the names; they must count from 0."""
        matches = (re.match(pattern, name) for name in state)
        found = sorted({int(match[1]) for match in matches if match})
        if found != list(range(len(found))):
            raise InputError(
                f"{path}: is no whole checkpoint of IPT: its names of the form {pattern} have the "
                f"numbers {found}, expected all from 0 on. Load it again from its source."
            )
        return len(found)

    features = shape("head.0.0.weight", 4)[0]
    counts = {
        "heads": numbers(r"head\.(\d+)\."),
        "tails": numbers(r"tail\.(\d+)\."),
        "encoder layers": numbers(r"body\.encoder\.layers\.(\d+)\."),
        "decoder layers": numbers(r"body\.decoder\.layers\.(\d+)\."),
    }
    mlp = "body.linear_encoding.weight" in state or "body.query_embed.weight" in state
    if mlp:
        rows, numbers_of_row = shape("body.query_embed.weight", 2)
        counts["task embeddings"] = rows
    tasks, layers = counts["heads"], counts["encoder layers"]
    wanted = {"decoder layers": layers, "tails": tasks, "task embeddings": tasks}
    unequal = [name for name, count in wanted.items() if counts.get(name, count) != count]
    if unequal:
        raise InputError(
            f"{path}: is no whole checkpoint of IPT: it has "
            f"{', '.join(f'{count} {name}' for name, count in counts.items())}; expected as many "
            "tails and embeddings as heads, and decoder layers as encoder layers."
        )
    if "body.position_encoding.pe.weight" in state:
        tokens = shape("body.position_encoding.pe.weight", 2)[0]
    else:
        positions = "none"
        if not mlp:
            raise InputError(
                f"{path}: the size of its patches cannot be told: it has neither "
                "body.position_encoding.pe.weight nor body.query_embed.weight."
            )
        tokens = numbers_of_row // (features * TOKEN**2)
    side = math.isqrt(tokens)
    if side**2 != tokens or not tokens:
        raise InputError(
            f"{path}: its {tokens} positions are no square of tokens, as IPT's patches have."
        )
    scales = []
    for task in range(tasks):
        steps = [name for name in state if re.fullmatch(rf"tail\.{task}\.0\.\d+\.weight", name)]
        first = shape(f"tail.{task}.0.0.weight", 4)[0] // features if steps else 1
        scales.append(3 if first == 9 else 2 ** len(steps))
    try:
        return Sizes(tuple(scales), features, side * TOKEN, layers, heads, positions, mlp)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def build_ipt(state: Mapping[str, torch.Tensor], sizes: Sizes, path: str) -> IPT:
    """The network of a state dict, of which every tensor fits and none is left over.

    It takes the tensors themselves and copies nothing. In evaluation mode.

    Args:
        state: by released names.
        sizes: expected, or from `sizes_of`.
        path: of the file, for messages.
    """
    with torch.device("meta"):
        network = IPT(sizes)
    if problems := differences(network.state_dict(), state):
        raise InputError(
            f"{path}: is not of the IPT that was asked for ({sizes}): {len(problems)} tensors "
            f"differ: {'; '.join(problems[:5])}. Nothing was loaded."
        )
    network.load_state_dict(dict(state), assign=True)
    return network.eval()
