"""Commands: each assembles parts and runs them. `run(arguments, prog)` returns the exit status."""
