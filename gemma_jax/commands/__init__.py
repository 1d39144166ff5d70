"""Commands: each assembles parts and runs them. `run(arguments, prog)` gives the exit status."""
