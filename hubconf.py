"""`torch.hub`: ResNets with the weights of any checkpoint that VirTex-D2 reads.

torch.hub.load("path/to/this/folder", "resnet50", weights="moco_v2_800ep.pth.tar", source="local")
"""

dependencies = ["torch", "torchvision", "safetensors", "detectron2"]


def resnet50(weights: str = "", layout: str = "", copy: str = "", prefix: str = ""):
    """torchvision's ResNet-50 without its classifier: (N, 3, H, W) -> (N, 2048).

    Args:
        weights: a checkpoint of any layout in docs/checkpoints.md; "": random.
        layout, copy, prefix: where its keys do not decide, and which of several networks to take.

    Raises:
        virtex_d2.engine.errors.InputError: the file holds no ResNet-50 that computes what
            torchvision's does.
    """
    import torch
    import torchvision

    from virtex_d2.checkpoint.source import read_backbone
    from virtex_d2.engine.errors import InputError

    model = torchvision.models.resnet50()
    model.fc = torch.nn.Identity()
    if weights:
        backbone = read_backbone(weights, layout, copy, prefix)
        if backbone.architecture.name != "resnet50":
            raise InputError(f"{weights}: is a {backbone.architecture.name}, expected a resnet50.")
        if backbone.doubts:
            raise InputError(f"{weights}: {backbone.doubts[0]}.")
        if backbone.preprocessing and backbone.preprocessing.stride_in_1x1:
            raise InputError(
                f"{weights}: its stride is in the 1x1 convolutions, torchvision's in the 3x3 ones. "
                "Load it into a detector, with MODEL.RESNETS.STRIDE_IN_1X1 True."
            )
        missing, unexpected = model.load_state_dict(backbone.tensors, strict=False)
        left = [name for name in missing if not name.endswith("num_batches_tracked")]
        assert not left, left  # `read_backbone` has checked it
        assert not unexpected, unexpected
    return model
