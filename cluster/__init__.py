"""Configuration, launch, wiring and the `pluglm` command."""
