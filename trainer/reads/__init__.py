"""How often training reads which entry: counted in bounded memory, over all ranks."""
