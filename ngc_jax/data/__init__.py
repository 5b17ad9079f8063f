"""Text in, batches out: corpora (`corpus.py`), tokens (`tokens.py`), batches by step (`batches.py`)."""
