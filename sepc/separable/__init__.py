"""Dense convolutions as products of separable ones: forms, fits, what they cost, and which to choose. Torch only."""
