"""From pretrained to NGC: models of others, read, measured, converted and written.

For: files and their names (`source.py`, `names.py`), work directories of them (`pretrained.py`),
what a matrix does in use (`calibrate.py`), and its other forms (`methods.py`, `convert.py`). Not
for: training (`training/`).
"""
