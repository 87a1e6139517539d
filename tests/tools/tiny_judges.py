"""Networks of evaluation with random weights: the real classes or file formats at tiny sizes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
)

from tools.random_sd3 import clip_tokenizer

CLASSES = 5
MAX_TOKENS = 12


class Inception(nn.Module):
    """A network with the interface of Inception in the file of clean-fid."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, features, 13, stride=11), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        )

    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        x = nn.functional.interpolate(img, (299, 299))
        features = self.layers((x - 128) / 128).flatten(1)
        return features if return_features else features.softmax(1)


def inception(folder: Path, features: int = 8) -> Path:
    """Write a TorchScript file with that network; returns its path."""
    torch.manual_seed(0)
    network = Inception(features).eval()
    nn.init.normal_(network.layers[0].weight, std=0.1)
    path = folder / "inception-2015-12-05.pt"
    torch.jit.script(network).save(str(path))
    return path


def clip(folder: Path) -> Path:
    """Write a CLIP with letters as tokens, and its processor; returns the folder."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    sizes |= {"num_hidden_layers": 2}
    tokens = {"vocab_size": 54, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = CLIPConfig(
        text_config={**sizes, **tokens, "max_position_embeddings": MAX_TOKENS},
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    model = CLIPModel(config)
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and "norm" not in name:
            nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    tokenizer = clip_tokenizer()
    tokenizer.model_max_length = MAX_TOKENS
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def segmenter(folder: Path) -> Path:
    """Write a SegFormer of five classes, and its processor; returns the folder."""
    torch.manual_seed(0)
    config = SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
        num_labels=CLASSES,
    )
    model = SegformerForSemanticSegmentation(config)
    for weight in model.parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    SegformerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder
