"""The two kinds of layers: with trainable block scales for training, with packed blocks for inference."""
