"""What all backbones on torch share: their base, tokens, storage and perceptual networks."""
