"""Plans a run on TPUs that are not present: compiles its program and analyses the compiled result."""
