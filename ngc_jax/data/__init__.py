"""Text in, batches out: corpora (`corpus.py`), tokens (`tokens.py`), batches as a function of the step (`batches.py`)."""
