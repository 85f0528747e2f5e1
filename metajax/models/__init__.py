"""Language models: layers, mixers, masks, positions, FLOPs, and `ops`, through which models call the kernels."""
