"""From entries to keys: encoders, tables, and how keys are held."""
