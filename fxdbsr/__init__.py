"""Block-sparse convolutional networks."""
