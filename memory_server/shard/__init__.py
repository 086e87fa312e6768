"""One shard: its rows, its epochs, and the rules that keep epochs consistent."""
