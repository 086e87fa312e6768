"""Fine-tuning of a PlugLM, or of plain BERT beside it, on a task's own files."""
