"""Search over one shard's keys: exact, or approximate as long as it is good enough."""
