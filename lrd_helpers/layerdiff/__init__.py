"""LayerDiff at this size (Huang et al. 2024): a background and layers with alpha, made together."""
