"""Editing a memory: from files of knowledge to a commit, and to the replies of a server.

A straight line: `passages` reads rows and checks them → `cutting` makes entries of them with the
store's tokenizer → `numbering` gives ids → `segment_writer` writes segments beside the store →
`edits` plans and commits → `live` has a running memory answer from it. Nothing prints.
"""
