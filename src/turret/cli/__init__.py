"""The `turret` command: parse the command line, call the workspace, print the result."""
