"""transformers: its config, loader and Trainer, with qfx as a quantization method."""
