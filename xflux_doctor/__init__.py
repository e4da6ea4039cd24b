"""A preflight doctor for FLUX.1 fine-tuning. Import its modules, not this package."""

__version__ = "0.1.0"
