"""Published weights: reads Hugging Face and Flax directories from disk to the mesh, and writes them."""
