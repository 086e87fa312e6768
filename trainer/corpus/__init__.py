"""Text in many formats to a corpus: training sequences and a memory of entries.

`build.build_corpus` makes one, `info.load_corpus_info` opens one, `tokenizer.tokenizer_fingerprint`
tells tokenizers apart, `embedded.embedded_corpus_path` finds the quickstart's text. Nothing is
imported here: the processes that encode import this package too, and need little of it.
"""
