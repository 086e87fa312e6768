"""A cluster of trainers and memory shards, simulated: what a step costs before the machines exist.

`scenario` says what is simulated and `service` how long its parts take, as measured. `events` plays
every request as an event; `statistics` draws whole steps at once, for clusters that are too large
for that; `failures` follows a run over hours. `outcome` is what all of them tell.
"""
