"""From pretrained to NGC: models of others, read, measured, converted and written.

For: files, their fields and names (`source.py`, `config_json.py`, `names.py`), work directories of
them (`pretrained.py`), what a matrix does in use (`calibrate.py`), and its other forms
(`methods.py`, `convert.py`). Not for: training (`training/`).
"""
