"""A trainer for FLUX.1 adapters that reads X-Flux's files. Import its modules, not this package."""
