"""References that are written out of the program itself: `python -m cluster.reference`."""
