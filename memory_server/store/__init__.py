"""The durable memory: plain files that hold every version of the entries."""
