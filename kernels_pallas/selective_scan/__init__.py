"""Mamba-1 selective scan and its causal depthwise convolution: reference, chunked XLA, Pallas TPU kernels."""
