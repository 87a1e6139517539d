"""The smallest flow transformer that trains: a section of a training configuration."""

TINY_FLOW = """
[codec.flow]
sample_size = 8
patch_size = 2
in_channels = 16
out_channels = 16
num_layers = 1
attention_head_dim = 8
num_attention_heads = 2
joint_attention_dim = 8
caption_projection_dim = 16
pooled_projection_dim = 8
pos_embed_max_size = 16
"""
