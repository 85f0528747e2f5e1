"""Mamba-1 selective scan and the causal depthwise convolution beside it: reference, XLA chunks, Pallas TPU kernel."""
