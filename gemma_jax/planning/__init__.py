"""Plan a run on TPUs that are not here: compile its program and read what the compiler made of it."""
