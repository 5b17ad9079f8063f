"""From pretrained to NGC. For: converting a model that exists. Not for: training one."""
