"""Language models: layers, mixers, masks, positions, FLOPs, and `ops`, the one door to kernels."""
