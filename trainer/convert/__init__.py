"""Conversion: published checkpoints both ways, BERTs to PlugLMs, and vectors that are kept."""
