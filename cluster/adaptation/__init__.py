"""What a memory is for: domains plugged in, training samples as knowledge, and what both are worth.

domain.py                       text of a domain to a plugged-in domain
settings.py, presets.py         the TOML of `pluglm adapt compare`
conditions.py                   from it to one fine-tuning per condition
comparing.py                    conditions fine-tuned over the same seeds, resumable
outcome.py                      their scores beside each other, with paired tests
prompt.py                       a training sample and its label as one text
in_task_settings.py             the TOML of `pluglm in-task`
in_task.py, in_task_run.py      samples as entries of a copy of the memory, and the comparison
"""
