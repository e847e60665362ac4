"""The published model as a transformers model, and how a folder of it is loaded.

`configuration_onevision_encoder.py` and `modeling_onevision_encoder.py` are copied into every export, so they import
only torch and transformers.
"""
