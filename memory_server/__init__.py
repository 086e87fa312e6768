"""PlugLM's memory: a durable, versioned store of passages, and exact top-k search over its
shards."""
