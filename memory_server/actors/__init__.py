"""The memory as Ray actors: who leads, who serves, and who takes over."""
