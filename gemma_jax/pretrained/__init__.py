"""Published weights: Hugging Face and Flax directories, read from disk to the mesh and written again."""
