"""From documents to batches: sources, tokenizers, token caches, packing, metadata and meta-tokens."""
