"""A synthetic world: facts that no weight can know, so every right answer was read from memory."""
