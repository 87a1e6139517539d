"""A BLIP-2 with random weights: the real classes at tiny sizes, and words instead of subwords."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipImageProcessor,
    OPTConfig,
    PreTrainedTokenizerFast,
)

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<image>")
VOCABULARY = (*SPECIAL, *(f"word{i}" for i in range(45)))


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(VOCABULARY)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )


def build(folder: Path) -> Path:
    """Write model and processor; returns the folder."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2}
    vision = {"intermediate_size": 16, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    qformer = {"vocab_size": 30, "num_hidden_layers": 2, "intermediate_size": 16}
    text = {"vocab_size": len(VOCABULARY), "num_hidden_layers": 1, "ffn_dim": 16}
    text |= {"max_position_embeddings": 80, "word_embed_proj_dim": 16, "init_std": 0.5}
    text |= {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    config = Blip2Config(
        vision_config=Blip2VisionConfig(initializer_range=0.2, **sizes, **vision),
        qformer_config=Blip2QFormerConfig(
            encoder_hidden_size=16, initializer_range=0.3, **sizes, **qformer
        ),
        text_config=OPTConfig(**sizes, **text),
        num_query_tokens=4,
        image_token_index=4,
        initializer_range=0.3,
    )
    model = Blip2ForConditionalGeneration(config)
    torch.nn.init.normal_(model.query_tokens)  # zeros otherwise, and every picture looks alike
    model.save_pretrained(folder)
    images = BlipImageProcessor(size={"height": 28, "width": 28})
    Blip2Processor(images, tokenizer(), num_query_tokens=4).save_pretrained(folder)
    return folder
