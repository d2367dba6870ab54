"""The `turret` command: decode the words, call the workspace, print the answer. Knows the terminal and nothing else."""
