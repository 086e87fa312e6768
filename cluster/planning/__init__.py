"""What a memory and its training take on given machines: measured constants, and plans."""
