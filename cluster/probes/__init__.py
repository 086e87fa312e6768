"""Cloze probes of facts (LAMA's format): what a model knows, and what edits change."""
