"""The smallest SD3 training set-up: base model, shards of random photos, configuration, tokens."""

from __future__ import annotations

from pathlib import Path

from tools import random_sd3
from tools.photos import write_shard

CONFIG = """
[sd3]
base = "{base}"
rate = {{ name = "r0508", token_side = 16, codebook_size = 16 }}
trained = "{trained}"
lora_rank = 2
hyper_encoder = {{ channels = 8, hyper_channels = 8 }}
quantizer = {{ hyper_channels = 8, code_dim = 4, output_channels = 8 }}
batch = 4
crop = 32
longest = 48
lpips_weight = 0.5
vq_weight = 0.25
caption_dropout = 0.3

[sd3.loop]
steps = 4
learning_rate = 1e-3
warmup = 1
schedule = "constant"
ema = 0.5
accumulate = {accumulate}
log_every = 1

[entropy]
model = {{ dim = 16, heads = 2, head_dim = 8, layers = 1, hidden = 16 }}
shapes = [[2, 3], [4, 3]]
tokens_per_step = 24
round_from = 1.0

[entropy.loop]
steps = 4
learning_rate = 1e-3
warmup = 1
log_every = 1
"""


def write_config(
    path: Path, base: Path, trained: str = "full", accumulate: int = 1, **changes: str
) -> Path:
    """A configuration file; ``changes`` replaces whole settings by name."""
    lines = CONFIG.format(base=base, trained=trained, accumulate=accumulate).splitlines()
    for name, value in changes.items():
        assert any(line.startswith(f"{name} = ") for line in lines), name
        lines = [f"{name} = {value}" if x.startswith(f"{name} = ") else x for x in lines]
    path.write_text("\n".join(lines))
    return path


def build(folder: Path) -> None:
    """``folder/base`` and ``folder/shards`` (two shards)."""
    random_sd3.pipeline().save_pretrained(folder / "base")
    (folder / "shards").mkdir()
    for seed in (1, 2):
        write_shard(folder / "shards" / f"photos-{seed}.tar", 12, seed)
