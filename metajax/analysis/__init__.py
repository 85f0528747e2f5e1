"""Analyses of trained models: numbers, the sentence that they make and their figures."""
