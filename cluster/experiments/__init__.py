"""Experiments that can be run again: named stages, seeds, results that are kept, comparisons."""
