"""Turns named corpora into batches: documents, their token cache, packed rows, and the loader of the rows.

`loader.prepare` is the entry point. Reading documents and packing need numpy alone; Grain, TFDS, ArrayRecord
and zstandard are imported only where they are first needed.
"""
