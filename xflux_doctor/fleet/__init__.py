"""Many nodes' reports into one: read, told apart, compared. `python -m xflux_doctor.fleet` runs on every node."""
