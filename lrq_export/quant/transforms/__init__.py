"""Exact transforms T of what a linear layer reads, undone in its weight: x W^T = (x T) (W T^-T)^T."""
