"""What starts a run on a cluster: batch scripts, manifests, command lines."""
