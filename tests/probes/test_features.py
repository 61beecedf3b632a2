"""Features: what they are and depend on, what the cache does, and that nothing is touched."""

import logging
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import ExifTags, Image

from tests.probes.small_sets import picture
from virtex_d2.checkpoint.resnet import ResNet
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import read_safetensors
from virtex_d2.studies.probes import features as features_module
from virtex_d2.studies.probes.data import CentralCrop, LabelledImages
from virtex_d2.studies.probes.features import (
    Extraction,
    build_network,
    complete_config,
    fingerprint,
)


@pytest.fixture
def network(make_cfg):
    cfg = make_cfg()
    complete_config(cfg)
    return build_network(cfg)[0]


@pytest.fixture
def extract(network, tmp_path):
    return Extraction(network, False, CentralCrop(36, 32), str(tmp_path / "cache"), batch_size=4)


@pytest.fixture
def files(tmp_path):
    paths = [str(tmp_path / f"{n}.png") for n in range(10)]
    for seed, path in enumerate(paths):
        picture((20 * seed, 120, 90), seed).save(path)
    return paths


@pytest.fixture
def forwards(network):
    """How many images have gone through the network."""
    seen = []
    network.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    return lambda: sum(seen)


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_features_are_what_torchvisions_network_computes(make_cfg, thin_backbone, files, order):
    """Independent of detectron2's ResNet and of the adapter: same file, another program."""
    path = thin_backbone(0, ResNet(18, 64, 64), channel_order=order)
    cfg = make_cfg("MODEL.WEIGHTS", path)
    complete_config(cfg)
    network, about = build_network(cfg)
    assert about["architecture"] == "resnet18"
    crop = CentralCrop(36, 32, cfg.INPUT.FORMAT)
    found = Extraction(network, False, crop, cfg.DATA.CACHE_DIR)(files).values

    model = torchvision.models.resnet18()
    tensors, _ = read_safetensors(path)
    model.load_state_dict(tensors, strict=False)
    model.fc = torch.nn.Identity()
    model.eval()
    mean = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
    std = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
    tf = torchvision.transforms
    to_crop = tf.Compose([tf.Resize(36), tf.CenterCrop(32), tf.PILToTensor()])
    pixels = torch.stack([to_crop(Image.open(file)) for file in files]).float()
    pixels = pixels if order == "RGB" else pixels.flip(1)
    with torch.no_grad():
        expected = model((pixels - mean) / std)
    assert found.shape == (10, 512)
    assert (found - expected).norm() / expected.norm() < 1e-5


def test_cached_features_are_not_computed_again(extract, files, forwards):
    first = extract(files)
    assert forwards() == 10
    again = extract(files)
    assert forwards() == 10
    assert torch.equal(first.values, again.values)


def test_batch_size_and_workers_change_neither_features_nor_their_place(
    extract, files, forwards, tmp_path
):
    first = extract(files)
    extract_otherwise = replace(extract, batch_size=3, num_workers=2)
    extract_otherwise(files)
    assert forwards() == 10, "they are in no key"
    elsewhere = replace(extract_otherwise, cache_dir=str(tmp_path / "other"))(files)
    assert forwards() == 20
    assert (elsewhere.values - first.values).norm() / first.values.norm() < 1e-6


def test_another_image_network_or_crop_has_features_of_its_own(extract, files, forwards):
    first = extract(files).values
    picture((250, 250, 0), 77).save(files[3])
    os.utime(files[3], ns=(1, 1))
    changed = extract(files).values
    assert forwards() == 20
    different = (changed != first).any(dim=1)
    assert different.nonzero().flatten().tolist() == [3]
    replace(extract, crop=CentralCrop(32, 32))(files)
    assert forwards() == 30
    replace(extract, stride_in_1x1=True)(files)
    assert forwards() == 40
    with torch.no_grad():
        extract.network.backbone.stem.conv1.norm.running_mean += 0.1
    extract(files)
    assert forwards() == 50
    extract.network.pixel_mean += 1
    extract(files)
    assert forwards() == 60


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_cache_is_found_and_made_anew(extract, files, forwards, damage, caplog):
    first = extract(files)
    [path] = Path(extract.cache_dir).rglob("*.safetensors")
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[-5] ^= 1  # within the numbers: the file's format does not notice
    else:
        content = content[: len(content) // 2] if damage == "truncated" else b""
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        again = extract(files)
    assert "damaged cache" in caplog.text
    assert str(path) in caplog.text
    assert forwards() == 20
    assert torch.equal(first.values, again.values)
    extract(files)
    assert forwards() == 20, "it was written again"


def test_an_interrupted_extraction_goes_on_where_it_was(extract, files, forwards, monkeypatch):
    monkeypatch.setattr(features_module, "SHARD_SIZE", 4)
    write, written = features_module._Shard.write, []

    def write_two(shard, features):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(shard)
        write(shard, features)

    monkeypatch.setattr(features_module._Shard, "write", write_two)
    with pytest.raises(KeyboardInterrupt):
        extract(files)
    assert forwards() == 10
    monkeypatch.setattr(features_module._Shard, "write", write)
    values = extract(files).values
    assert forwards() == 12, "the last two images alone"
    monkeypatch.setattr(features_module, "SHARD_SIZE", 4096)
    assert torch.allclose(extract(files).values, values, rtol=1e-5)


def test_the_network_is_byte_for_byte_what_it_was(extract, files):
    network = extract.network
    before = {name: t.numpy().tobytes() for name, t in network.state_dict().items()}
    buffers = {name: t.numpy().tobytes() for name, t in network.named_buffers()}
    assert any("running_var" in name for name in buffers)
    digest = fingerprint(network)
    extract(files)
    assert before == {name: t.numpy().tobytes() for name, t in network.state_dict().items()}
    assert buffers == {name: t.numpy().tobytes() for name, t in network.named_buffers()}
    assert fingerprint(network) == digest


def test_norms_that_see_the_images_make_the_extraction_fail(extract, files):
    """VirTex's released code once updated running statistics of a frozen backbone."""
    extract.network.train()
    with pytest.raises(RuntimeError, match="frozen network has changed"):
        extract(files)


def test_images_of_every_kind_come_as_everywhere_in_the_project(extract, tmp_path):
    grey = picture((90, 160, 40), 1, (48, 36)).convert("L")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    saved = {
        "grey.png": grey,
        "rgb.png": grey.convert("RGB"),
        "palette.png": grey.convert("P"),
        "cmyk.tif": grey.convert("RGB").convert("CMYK"),
        "deep.png": Image.fromarray(np.asarray(grey, np.uint16) * 257),
        "turned.png": grey.transpose(Image.Transpose.ROTATE_90),
    }
    paths = []
    for name, image in saved.items():
        paths.append(str(tmp_path / name))
        image.save(paths[-1], **({"exif": exif} if name == "turned.png" else {}))
    values = extract(paths).values
    for row in values[1:]:
        assert (row - values[0]).norm() / values[0].norm() < 0.02


def test_images_that_cannot_be_decoded_are_named(extract, files, caplog):
    with open(files[2], "wb") as file:
        file.write(b"no image")
    os.remove(files[7])
    for _ in range(2):  # computed, and cached
        features = extract(files)
        assert sorted(features.unusable) == [2, 7]
    images = LabelledImages(files, np.arange(10), ("a",), "the files")
    with caplog.at_level(logging.WARNING):
        values, labels = extract.labelled(images, "training", 0.2)
    assert labels.tolist() == [0, 1, 3, 4, 5, 6, 8, 9]
    assert torch.equal(values, features.values[labels])
    assert files[2] in caplog.text
    with pytest.raises(InputError, match="2 of 10 test images cannot be decoded") as error:
        extract.labelled(images, "test", 0.0)
    assert files[2] in str(error.value)
    with pytest.raises(InputError, match="MAX_SKIPPED_SHARE"):
        extract.labelled(images, "training", 0.1)


def test_a_cache_that_cannot_be_written_is_an_input_error(extract, files, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="DATA.CACHE_DIR"):
        replace(extract, cache_dir=str(tmp_path / "file" / "cache"))(files)


@pytest.mark.parametrize(("start", "scale"), [("random", 1), ("random_zero_scales", 0)])
def test_random_networks_follow_from_their_seed(make_cfg, start, scale):
    def random_network(seed):
        cfg = make_cfg(
            *("MODEL.WEIGHTS", start, "SEED", seed),
            *("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
        )
        complete_config(cfg)
        return build_network(cfg)[0]

    first = random_network(1)
    torch.rand(5)  # what was drawn before does not matter
    assert fingerprint(random_network(1)) == fingerprint(first)
    assert fingerprint(random_network(2)) != fingerprint(first)
    assert (first.backbone.res5[1].conv2.norm.weight == scale).all()
    assert (first.backbone.res5[1].conv1.norm.weight == 1).all()


def test_a_resnet_that_detectron2_cannot_build_is_an_input_error(make_cfg):
    cfg = make_cfg("MODEL.WEIGHTS", "random", "MODEL.RESNETS.DEPTH", 18)
    with pytest.raises(InputError, match=r"MODEL.RESNETS: .*RES2_OUT_CHANNELS"):
        build_network(cfg)
