"""The base of everything else: typed fields, errors, files, storage, progress, registries; no JAX arrays."""
