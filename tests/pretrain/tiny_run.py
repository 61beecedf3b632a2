"""The folder of a pretraining run, without the run: a small model of random weights."""

from pathlib import Path

import torch
from torch import nn

from pretrain.config import get_pretrain_cfg
from pretrain.methods.captioning.tokenizer import train_tokenizer
from pretrain.methods.method import build_method

CAPTIONS = [
    "a man rides a horse on the beach",
    "two dogs play with a red ball",
    "a plate of food on a wooden table",
    "the horse stands left of a small house",
]
VOCAB = 70


def tiny_config(objective: str = "bicaptioning"):
    cfg = get_pretrain_cfg()
    cfg.MODEL.OBJECTIVE = objective
    cfg.MODEL.VISUAL.NAME = "resnet18"
    cfg.MODEL.TEXTUAL.HIDDEN_SIZE = 32
    cfg.MODEL.TEXTUAL.ATTENTION_HEADS = 2
    cfg.MODEL.TEXTUAL.MAX_LENGTH = 8
    cfg.DATA.IMAGE_SIZE = 64
    return cfg


def write_run(folder: Path, objective: str = "bicaptioning") -> Path:
    """config.yaml, tokenizer.model, model_final.pth and last_checkpoint; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    cfg = tiny_config(objective)
    cfg.OUTPUT_DIR = str(folder)
    torch.manual_seed(0)
    model = build_method(cfg, VOCAB)
    for parameter in model.textual.parameters():  # so that words differ clearly in probability
        nn.init.normal_(parameter, std=0.3)
    train_tokenizer(CAPTIONS, VOCAB, folder / "tokenizer.model")
    (folder / "config.yaml").write_text(cfg.dump())
    torch.save({"model": model.state_dict(), "iteration": 1}, folder / "model_final.pth")
    (folder / "last_checkpoint").write_text("model_final.pth")
    return folder
