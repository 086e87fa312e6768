"""PlugLM's memory: a durable, versioned store of passages, with exact sharded search."""
