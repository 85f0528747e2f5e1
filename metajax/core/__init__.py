"""What everything else stands on: typed fields, errors, files, storage, progress; no JAX arrays."""
