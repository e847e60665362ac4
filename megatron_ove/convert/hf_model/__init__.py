"""The modelling code that is copied into every export; imports nothing of this package, only torch and transformers."""
