"""How searches travel: frames, the server in each shard, the client that asks all of them."""
