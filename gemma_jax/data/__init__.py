"""From named corpora to batches: documents, their token cache, packed rows, and the loader that reads them.

`loader.prepare` is the front door. Reading documents and packing need numpy alone; Grain, TFDS, ArrayRecord
and zstandard are imported where they are first needed.
"""
